# Read by ../install.sh. NVIDIA's onnxruntime-gpu, where it is installed, is one of the system's packages.
extras=onnx,cli
venv_options=--system-site-packages
family=fashion
