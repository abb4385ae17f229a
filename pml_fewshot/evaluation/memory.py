"""How much memory is free, on a CPU or a GPU."""

from pathlib import Path

import torch

UNKNOWN = 2**30  # assumed free where the system does not say: small enough for any machine that trains networks


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device without swapping: of a GPU as its driver says, else Linux's MemAvailable."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, to be used again
        return torch.cuda.mem_get_info(device)[0] + held
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return UNKNOWN
