"""Several processes that train one model, one on each GPU: ``torchrun`` starts them.

Every process computes a batch of its own; gradients are averaged before each step, so that all hold
the same weights. What is written, only the first one writes. Without torchrun there is one process,
and all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from agent.errors import UserError


def join(device: str = "auto") -> torch.device:
    """The device of this process, after all processes have met where there are several.

    Args:
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA where there is one.

    Raises:
        UserError: CUDA was asked for and is not there, or not for every process.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r}: expected auto, cpu or cuda")
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise UserError(
            f"process {local + 1} finds {torch.cuda.device_count()} CUDA devices: start as many "
            "processes as there are, or set the device to cpu"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        return torch.device("cpu")
    torch.cuda.set_device(local)
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", local)


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that writes, logs and measures."""
    return rank() == 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average(parameters: Iterable[nn.Parameter]) -> None:
    """Make every gradient the mean over all processes, which must have the same ones."""
    if size() == 1:
        return
    own = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in own])
    dist.all_reduce(flat)
    flat /= size()
    for grad, mean in zip(own, flat.split([grad.numel() for grad in own]), strict=True):
        grad.copy_(mean.view_as(grad))


def agree(*values: float, device: torch.device | None = None) -> list[float]:
    """The first process's values, in all of them: what decides whether to go on must be equal."""
    if size() == 1:
        return list(values)
    told = torch.tensor(values, dtype=torch.float64, device=device)
    dist.broadcast(told, 0)
    return [float(value) for value in told]
