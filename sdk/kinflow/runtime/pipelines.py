"""Command lines that write a camera's frames, scaled to a family's size, to standard output. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from kinflow.manifest import Preprocess


@dataclass(frozen=True)
class Pipeline:
    command: tuple[str, ...]
    install: str
    """What brings the program."""
    rgba: bool = False
    """Frames are red, green, blue, alpha, whatever the family's mode."""


def v4l2(device: str, preprocess: Preprocess) -> Pipeline:
    """A Video4Linux camera, in the size and format that its driver prefers."""
    return _ffmpeg(("-f", "v4l2", "-i", device), preprocess)


def stream(url: str, preprocess: Preprocess) -> Pipeline:
    """Whatever ffmpeg can open: RTSP, HTTP, a file."""
    # UDP loses packets, and a decoder shows every lost one.
    transport = ("-rtsp_transport", "tcp") if url.startswith("rtsp") else ()
    return _ffmpeg((*transport, "-i", url), preprocess)


def _ffmpeg(source: tuple[str, ...], preprocess: Preprocess) -> Pipeline:
    size = f"{preprocess.width}:{preprocess.height}"
    scale = f"scale={size}"
    if preprocess.resize == "crop":
        scale += f":force_original_aspect_ratio=increase,crop={size}"
    pixels = "rgb24" if preprocess.mode == "RGB" else "gray"
    quiet = ("-nostdin", "-hide_banner", "-loglevel", "error")
    written = ("-an", "-vf", scale, "-f", "rawvideo", "-pix_fmt", pixels, "-")
    return Pipeline(("ffmpeg", *quiet, *source, *written), "apt install ffmpeg")


# A mode of every CSI sensor that NVIDIA ships drivers for.
_CSI_WIDTH, _CSI_HEIGHT, _CSI_RATE_HZ = 1280, 720, 30


def jetson(sensor: int, preprocess: Preprocess) -> Pipeline:
    """A CSI camera through the Jetson's own converter, which cuts and scales without the CPU.

    RGBA, because GStreamer pads the rows of narrower formats to four bytes.
    """
    width, height = preprocess.width, preprocess.height
    cut: tuple[str, ...] = ()
    if preprocess.resize == "crop":
        kept_width = min(_CSI_WIDTH, _CSI_HEIGHT * width // height)
        kept_height = min(_CSI_HEIGHT, _CSI_WIDTH * height // width)
        left, top = (_CSI_WIDTH - kept_width) // 2, (_CSI_HEIGHT - kept_height) // 2
        cut = (f"left={left}", f"right={left + kept_width}", f"top={top}", f"bottom={top + kept_height}")
    captured = f"video/x-raw(memory:NVMM),width={_CSI_WIDTH},height={_CSI_HEIGHT},framerate={_CSI_RATE_HZ}/1"
    return Pipeline(
        (
            *("gst-launch-1.0", "-q", "nvarguscamerasrc", f"sensor-id={sensor}", "!", captured, "!"),
            *("nvvidconv", *cut, "!", f"video/x-raw,width={width},height={height},format=RGBA", "!"),
            *("fdsink", "fd=1", "sync=false"),
        ),
        "JetPack brings it: apt install gstreamer1.0-tools nvidia-l4t-gstreamer",
        rgba=True,
    )
