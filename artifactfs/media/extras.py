"""Libraries that only media need: imported when they are first used, and named with their extra when they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from artifactfs.errors import ArtifactFSError, also


def need(module: str, what: str) -> Any:
    """The module ``module``; ``what`` is what needs it, for the message. An ImportError names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _PACKAGES.get(module.partition(".")[0], module)
        text = f"{what} needs {package}, which cannot be imported ({error}); install it with: pip install 'artifactfs[media]'"
        raise also(ArtifactFSError(text), ImportError) from None


_PLAIN = ("builtins", "datetime")
_PACKAGES = {"PIL": "Pillow", "imageio_ffmpeg": "imageio-ffmpeg"}


def is_array(value: Any) -> bool:
    """Whether it is a numpy array; numpy is not imported for it."""
    return any(kind.__module__ == "numpy" and kind.__name__ == "ndarray" for kind in type(value).__mro__)


def is_frame(value: Any) -> bool:
    """Whether it is a pandas DataFrame."""
    return any(kind.__module__.partition(".")[0] == "pandas" and kind.__name__ == "DataFrame" for kind in type(value).__mro__)


def is_tensor(value: Any) -> bool:
    """Whether it is a PyTorch tensor."""
    return any(kind.__module__.partition(".")[0] == "torch" and kind.__name__ == "Tensor" for kind in type(value).__mro__)


def plain(value: Any) -> Any:
    """Tensors of PyTorch, TensorFlow and JAX as numpy arrays; anything else as it is."""
    if type(value).__module__ in _PLAIN:
        return value
    if is_tensor(value):
        return value.detach().cpu().numpy()
    module = type(value).__module__.partition(".")[0]
    if module in ("tensorflow", "jax", "jaxlib") and hasattr(value, "__array__"):
        return need("numpy", f"a value of {module}").asarray(value)
    return value


def is_scalar(value: Any) -> bool:
    """Whether it is a scalar of numpy."""
    return any(kind.__module__ == "numpy" and kind.__name__ == "generic" for kind in type(value).__mro__)
