"""A GPU that is not there: tensors that say ``cuda:0``, keep their numbers on the CPU, and refuse what CUDA refuses.

Code written for a GPU runs through it unchanged, with real numbers. Not found are missing kernels, full memory,
inference tensors that training touches, and everything about speed. For autograd a tensor lies on the ``meta`` device,
as in torch's own FakeTensor (its engine would open a CUDA context for ``cuda``): an operation that asks for ``meta``
while one of our tensors takes part, or inside a backward pass, means the GPU.
"""

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils._device
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
_tensor = torch.tensor

# What CUDA allows between a CPU tensor of any size and one of its own; zero-dimensional CPU tensors are always allowed.
_ACROSS = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
}  # fmt: skip


class GpuTensor(torch.Tensor):
    """A tensor of the fake GPU; ``held`` is the CPU tensor with its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False) -> "GpuTensor":
        with torch.inference_mode(False):  # a view of a tensor with a version counter must have one
            shape = torch.empty_strided(held.size(), held.stride(), dtype=held.dtype, device="meta")
            made = torch.Tensor._make_subclass(cls, shape, requires_grad, device_for_backend_keys=GPU)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})

    def numpy(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy
    tolist = property(lambda self: self.held.tolist)
    data_ptr = property(lambda self: self.held.data_ptr)  # who saves tensors looks for those that share a storage
    untyped_storage = property(lambda self: self.held.untyped_storage)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GpuTensor({self.held})"

    # torch would make tensors of lists and numbers on the meta device and lose their values
    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.Tensor.__getitem__(self, _index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            value = GpuTensor(_tensor(value, dtype=self.dtype))
        torch.Tensor.__setitem__(self, _index(index), value)


def _index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return _tensor(np.asarray(index)) if isinstance(index, (list, range, np.ndarray)) else index


def _refuse(func: Any, args: tuple, ours: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    """Raise what CUDA raises."""
    if func is aten._pin_memory.default and ours:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    if ours and plain and func is aten.index.Tensor and not isinstance(args[0], GpuTensor):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if ours and func not in _ACROSS and any(tensor.dim() for tensor in plain):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({func})")


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation: on the CPU tensors that ours hold; its result is ours again where CUDA's would lie on the GPU."""
    leaves = tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, GpuTensor)]
    plain = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, GpuTensor)]
    if func is torch.ops.prim.device.default:
        return args[0].device
    if func is aten.is_pinned.default:
        return False
    _refuse(func, args, ours, plain)
    if func is aten._pin_memory.default:
        return args[0].clone()
    onto_gpu, asked = bool(ours), kwargs.get("device")
    if asked is not None:
        kind = torch.device(asked).type
        means_gpu = kind == "meta" and (bool(ours) or torch._C._current_graph_task_id() != -1)
        if kind == "meta" and not means_gpu:
            return func(*args, **kwargs)
        onto_gpu = kind == "cuda" or means_gpu
        kwargs = kwargs | {"device": CPU}
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    args, kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, GpuTensor) else leaf, (args, kwargs))
    out = func(*args, **kwargs)
    if not onto_gpu or func is aten._local_scalar_dense.default:
        return out
    known = {id(tensor.held): tensor for tensor in ours}  # in-place operations give back the very tensor

    def wrap(leaf: Any) -> Any:
        is_plain = isinstance(leaf, torch.Tensor) and not isinstance(leaf, GpuTensor)
        return known.get(id(leaf), GpuTensor(leaf)) if is_plain else leaf

    return tree_map(wrap, out)


class _Mode(TorchDispatchMode):
    """Catches what makes tensors on ``device="cuda"`` from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Scaled dot product attention written out: torch's own picks a kernel by the device it finds below ours."""
    if enable_gqa:
        n_repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(n_repeats, -3), value.repeat_interleave(n_repeats, -3)
    weights = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        weights = weights.masked_fill(~attn_mask, float("-inf")) if is_bool else weights + attn_mask
    return torch.dropout(weights.softmax(-1), dropout_p, dropout_p > 0) @ value


def _new_tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
    made = _tensor(data, **kwargs)
    return made if device is None else made.to(device)


@contextlib.contextmanager
def fake_cuda(*, name: str = "NVIDIA L4", total_memory: float = 23.6e9) -> Iterator[None]:
    """Inside the block ``torch.cuda`` describes one GPU, and ``device="cuda"`` gives :class:`GpuTensor`."""
    properties = SimpleNamespace(name=name, total_memory=int(total_memory), major=8, minor=9, multi_processor_count=58)
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True, "_is_in_bad_fork": False,
        "get_device_properties": properties, "get_device_name": name, "get_device_capability": (8, 9),
        "mem_get_info": (int(total_memory), int(total_memory)), "is_bf16_supported": True, "memory_allocated": 0,
        "max_memory_allocated": 0, "is_current_stream_capturing": False, "get_rng_state_all": [],
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), **dict.fromkeys(
            ("set_rng_state", "_lazy_init", "set_device", "synchronize", "empty_cache", "manual_seed",
             "manual_seed_all", "set_rng_state_all", "reset_peak_memory_stats")
        ),
    }  # fmt: skip
    torch._C._ensureCUDADeviceGuardSet()  # without a driver: the guard that does nothing
    torch.utils._device._device_constructors()  # torch keeps the first answer, and ours is in it below
    AcceleratorState._reset_state(True)  # accelerate remembers the first device of a process
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    patches = (
        mock.patch.multiple(torch.cuda, **{key: mock.Mock(return_value=value) for key, value in answers.items()}),
        mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),  # a mode holds in its own thread only
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention),
        mock.patch.object(torch, "tensor", _new_tensor),
        _Mode(),
    )
    with contextlib.ExitStack() as stack:
        stack.callback(AcceleratorState._reset_state, True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        for patch in patches:
            stack.enter_context(patch)
        yield
