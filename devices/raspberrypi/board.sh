# Read by ../install.sh. Both runtimes, so that `kinflow tune` can choose; picamera2 is one of the system's packages.
extras=onnx,tflite,cli
venv_options=--system-site-packages
family=fashion
