"""Write GGUF files, one tensor in memory at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from vlm_sft.errors import UserError
from vlm_sft.utils.libraries import import_extra

OutType = Literal["f16", "q8_0"]
"""Types of the matrices: 16 bits, or 8.5 (blocks of 32 int8 with one scale in 16 bits)."""

EXTRA: Final = "gguf"
"""The extra that installs `gguf` and `xllamacpp`."""

_FILE_TYPES: Final = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
_FLOAT16_MAX: Final = 65504.0


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file consists of.

    Attributes:
        architecture: `general.architecture`.
        fields: Metadata without the prefix of the architecture, in order: key and value. A value
            is a str, bool, int, float or a list of one of them.
        tensors: Names and values, in order. Vectors, and matrices listed in `exact`, are written
            in float32, other matrices in the type of the export.
        exact: Names of matrices that are kept in float32.
    """

    architecture: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    exact: frozenset[str] = frozenset()


def write_gguf(path: Path, file: GgufFile, outtype: OutType) -> None:
    """Write a GGUF file.

    Raises:
        UserError: A weight is too large for float16.
    """
    gguf: Any = import_extra("gguf", EXTRA)
    writer = gguf.GGUFWriter(path, file.architecture)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[outtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in file.fields.items():
        _add_field(gguf, writer, key, value)
    types = {name: tensor_type(name, value, file, outtype) for name, value in file.tensors.items()}
    for name, value in file.tensors.items():
        kind = gguf.GGMLQuantizationType[types[name]]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(
            name, list(value.shape), np.dtype(np.float32), value.numel() // block * size, kind
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, value in file.tensors.items():
            writer.write_tensor_data(_converted(gguf, name, value, types[name]))
    finally:
        writer.close()


def tensor_type(name: str, value: Tensor, file: GgufFile, outtype: OutType) -> str:
    """Return the GGML type in which a tensor is written: `F32`, `F16` or `Q8_0`."""
    if value.ndim < 2 or name in file.exact:
        return "F32"
    if outtype == "q8_0" and value.ndim == 2 and value.shape[-1] % 32 == 0:
        return "Q8_0"
    return "F16"


def _add_field(gguf: Any, writer: Any, key: str, value: Any) -> None:
    """Add metadata; integers become uint32, or int32 in lists, as llama.cpp reads them."""
    kinds = gguf.GGUFValueType
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        sub_type = {int: kinds.INT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value[0])]
        writer.add_key_value(key, value, kinds.ARRAY, sub_type)


def _converted(gguf: Any, name: str, value: Tensor, kind: str) -> np.ndarray:
    plain = value.detach().to("cpu", torch.float32).contiguous().numpy()
    if kind == "F32":
        return plain
    largest = float(np.abs(plain).max()) if plain.size else 0.0
    if not largest <= _FLOAT16_MAX:  # also refuses NaN
        raise UserError(
            f"export: the tensor {name} has a weight of {largest:.3g}, and GGUF's {kind} holds at "
            f"most {_FLOAT16_MAX:.0f}"
        )
    if kind == "F16":
        return plain.astype(np.float16)
    quantized: np.ndarray = gguf.quants.quantize(plain, gguf.GGMLQuantizationType[kind])
    return quantized
