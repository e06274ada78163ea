"""Files that torch.save wrote (.pt, .pth, .bin): their tensors, without running anything that stands in them.

PyTorch's own reader of tensors alone (weights_only) is used; PyTorch itself is the extra `torch`, which nothing else
needs.
"""

import argparse
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from eim_jax.models.hugging_face import WeightsError

# Their names of the number formats -> safetensors'.
_DTYPES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float64": "F64",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.float8_e4m3fn": "F8_E4M3",
}


def read(path: pathlib.Path) -> Any:
    """Returns what a file of torch.save holds: tensors in dicts and lists, plain values, an argparse.Namespace.

    Tensors stay on disk until they are read, where the file's form allows it.

    Raises:
      WeightsError: PyTorch is not installed, the file is damaged, or it holds other things than tensors.
    """
    try:
        import torch  # here: seconds, and hundreds of MB that a run from safetensors never needs
    except ImportError as error:
        raise WeightsError(
            f"{path} is a file of PyTorch's, which is not installed here: pip install '.[torch]' in eim_jax's folder "
            "(a CPU build will do)"
        ) from error
    said = ""
    for on_disk in (True, False):  # files of PyTorch before 1.6 cannot stay on disk
        try:
            # LaVIN stores its command line, argparse.Namespace: a plain bag of values, which runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=on_disk)
        except Exception as error:  # the reader raises many kinds for damaged files
            said = str(error).strip() or type(error).__name__
    if found := re.search(r"GLOBAL ([\w.]*\w)", said):
        raise WeightsError(
            f"{path} holds {found[1]} beside tensors: it is not read, since that could run whatever the file says. "
            "Save its state_dict alone"
        )
    first = said.splitlines()[0][:200]
    raise WeightsError(f"{path} cannot be read by PyTorch ({first}): download it again, or save its state_dict")


class WeightFile:
    """A state_dict, {key: tensor}, as an open safetensors file would give it."""

    def __init__(self, tensors: Any, path: pathlib.Path):
        if not isinstance(tensors, Mapping):
            raise WeightsError(f"{path} holds {type(tensors).__name__}, not tensors by name: save its state_dict")
        others = [key for key, value in tensors.items() if not (isinstance(key, str) and hasattr(value, "dtype"))]
        if others:
            raise WeightsError(
                f"{path}: {others[0]!r:.80} is no tensor but {type(tensors[others[0]]).__name__}: save the model's "
                "state_dict alone"
            )
        self._tensors = dict(tensors)

    def keys(self) -> Iterable[str]:
        """Returns the keys."""
        return self._tensors.keys()

    def get_slice(self, key: str) -> "Header":
        """Returns what is known of a tensor without reading it."""
        tensor = self._tensors[key]
        return Header(tensor.shape, _DTYPES.get(str(tensor.dtype), str(tensor.dtype)))

    def get_tensor(self, key: str) -> np.ndarray:
        """Returns a tensor; bfloat16, which NumPy lacks, as ml_dtypes has it."""
        tensor = self._tensors[key].detach().contiguous()
        if str(tensor.dtype) == "torch.bfloat16":
            import torch

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


class Header:
    """A tensor's shape and number format, as safetensors' slices give them."""

    def __init__(self, shape: Sequence[int], dtype: str):
        self._shape, self._dtype = list(shape), dtype

    def get_shape(self) -> list[int]:
        """Returns the shape."""
        return self._shape

    def get_dtype(self) -> str:
        """Returns safetensors' name of the number format."""
        return self._dtype
