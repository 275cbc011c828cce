"""Sounds and films."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from artifactfs.errors import UsageError
from artifactfs.media.base import Plan
from artifactfs.media.extras import is_array, need, plain
from artifactfs.media.payload import FileMedia, MadeFile, Payload, PictureMedia, RemoteFile, UserFile, is_path, is_remote

DEFAULT_FPS = 4


class Audio(FileMedia):
    """A sound: a file, samples as (frames,) or (frames, channels), or an http, s3 or gs URI. Samples are written as WAV."""

    kind: ClassVar[str] = "audio-file"
    folder: ClassVar[str] = "media/audio"

    def __init__(self, data_or_path: Any, sample_rate: int | None = None, caption: str | None = None) -> None:
        payload: Payload
        if is_remote(data_or_path):
            payload = RemoteFile(data_or_path)
        elif is_path(data_or_path):
            payload = UserFile(data_or_path)
        elif sample_rate is None:
            raise UsageError('Argument "sample_rate" is required when instantiating Audio with raw data.')
        else:
            payload = MadeFile(_wav(data_or_path, sample_rate), ".wav")
        super().__init__(payload, caption)

    @property
    def sample_rate(self) -> int:
        """Frames in a second."""
        return int(_sound("a sample rate").info(self.path).samplerate)

    @property
    def duration(self) -> float:
        """Seconds."""
        return float(_sound("a duration").info(self.path).duration)

    def to_numpy(self) -> Any:
        """The samples, -1 to 1, as (frames,) or (frames, channels)."""
        return _sound("samples").read(self.path)[0]

    def describe(self, plan: Plan) -> dict[str, Any]:
        return {**super().describe(plan), "caption": self.caption}  # W&B's client cannot read a sound that has none


class Video(PictureMedia):
    """A film: a file, bytes in an ``io`` object, or frames as (time, channels, height, width), 0 to 255.

    More films of one length are given as (batch, time, channels, height, width) and shown side by side. ``format`` is gif, mp4,
    webm or ogg; what is no path needs it. ``fps`` is for frames; the default is 4.
    """

    kind: ClassVar[str] = "video-file"
    folder: ClassVar[str] = "media/videos"
    EXTS: ClassVar[tuple[str, ...]] = ("gif", "mp4", "webm", "ogg")

    def __init__(self, data_or_path: Any, caption: str | None = None, fps: int | None = None, format: str | None = None) -> None:
        self._size: tuple[int, int] | None = None
        payload: Payload
        if is_path(data_or_path):
            self._checked(os.path.splitext(os.fspath(data_or_path))[1][1:].lower(), os.fspath(data_or_path))
            payload = UserFile(data_or_path)
        elif hasattr(data_or_path, "read"):
            payload = MadeFile(data_or_path.read(), f".{self._checked(format, 'raw bytes (an io object)')}")
        else:
            extension = self._checked(format, "a numpy array")
            frames = _frames(data_or_path)
            film, self._size = _film(frames, extension, fps or DEFAULT_FPS)
            payload = MadeFile(film, f".{extension}")
        super().__init__(payload, caption)

    def to_numpy(self) -> Any:
        """The frames, (time, channels, height, width)."""
        imageio = need("imageio.v3", "a Video as an array")
        if self.path.endswith(".gif"):
            frames = imageio.imread(self.path, plugin="pillow", mode="RGB")
        else:
            frames = imageio.imread(self.path, plugin="FFMPEG", extension=_known(self.path))
        return need("numpy", "a Video as an array").moveaxis(frames, -1, 1)

    def describe(self, plan: Plan) -> dict[str, Any]:
        value = super().describe(plan)
        return {**value, "width": self._size[0], "height": self._size[1]} if self._size else value

    @classmethod
    def _checked(cls, format: str | None, what: str) -> str:
        if format is None:
            raise UsageError(f"Video requires a `format` argument when initializing with {what}: {', '.join(cls.EXTS)}")
        if format not in cls.EXTS:
            raise UsageError(f"Video accepts {', '.join(cls.EXTS)} formats, and {what} is not one of them")
        return format


def _sound(what: str) -> Any:
    return need("soundfile", f"Audio with {what}")


def _wav(samples: Any, rate: int) -> bytes:
    soundfile = _sound("raw data")
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, plain(samples), rate, format="WAV")
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise UsageError(f"the samples cannot be written as WAV: {error}") from None
    return buffer.getvalue()


def _frames(data: Any) -> Any:
    """(time, height, width, channels), bytes, a batch laid out side by side."""
    numpy = need("numpy", "a Video of frames")
    array = plain(data)
    if not is_array(array):
        raise UsageError(f"Video accepts a file path or numpy like data as input, not {type(data).__name__}")
    if array.ndim not in (4, 5):
        raise UsageError("Video must be at least 4 dimensions: time, channels, height, width")
    if array.size and not (array.min() >= 0 and array.max() <= 255):
        raise UsageError(f"frames are 0 to 255, and these are {array.min()} to {array.max()}; scale them first")
    batch = array.astype(numpy.uint8).reshape((-1, *array.shape[-4:]))
    count, time, channels, height, width = batch.shape
    if channels not in (1, 3):
        raise UsageError(f"frames have 1 or 3 channels, and these have {channels}: (time, channels, height, width)")
    if not count * time * height * width:
        raise UsageError("a Video needs at least one frame of at least one pixel")
    padded = 1 << (count - 1).bit_length()
    batch = numpy.concatenate([batch, numpy.zeros((padded - count, *batch.shape[1:]), numpy.uint8)])
    rows = 1 << ((count.bit_length() - 1) // 2)
    grid = batch.reshape(rows, padded // rows, time, channels, height, width).transpose(2, 0, 4, 1, 5, 3)
    film = grid.reshape(time, rows * height, padded // rows * width, channels)
    return film if channels == 3 else film.repeat(3, axis=3)


def _film(frames: Any, extension: str, fps: int) -> tuple[bytes, tuple[int, int]]:
    """The encoded film, and its width and height."""
    if extension == "gif":
        return _gif(frames, fps), (frames.shape[2], frames.shape[1])
    numpy = need("numpy", "a Video of frames")
    # These codecs halve the colours' resolution: an odd edge is doubled.
    frames = numpy.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    imageio = need("imageio.v3", "a Video of frames")
    need("imageio_ffmpeg", "a Video of frames")
    codec, container = _CODECS[extension], ["-f", extension]
    with tempfile.TemporaryDirectory(prefix="artifactfs-video-") as folder:
        path = Path(folder, f"film{_known(f'film.{extension}')}")
        imageio.imwrite(
            path,
            frames,
            plugin="FFMPEG",
            fps=fps,
            codec=codec,
            output_params=container,
            macro_block_size=1,
            pixelformat="yuv420p",
        )
        return path.read_bytes(), (frames.shape[2], frames.shape[1])


def _known(path: str) -> str:
    """The extension by which imageio gives a film to ffmpeg, which looks at the content: it does not know ``.ogg``."""
    extension = os.path.splitext(path)[1]
    return ".mkv" if extension == ".ogg" else extension


_CODECS = {"mp4": "libx264", "webm": "libvpx-vp9", "ogg": "libtheora"}


def _gif(frames: Any, fps: int) -> bytes:
    pillow = need("PIL.Image", "a Video of frames")
    first, *others = [pillow.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    first.save(buffer, format="gif", save_all=True, append_images=others, duration=max(20, round(1000 / fps)), loop=0)
    return buffer.getvalue()
