"""The doctor on the machine: encoder and weights, device, memory and disk against what the run will need."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch

from datasets.features.encoding import VIEW_COUNTS
from datasets.features.neighbor_files import Residence
from datasets.layout import Layout
from models.patch_encoders.build import PatchEncoderSpec, patch_encoder_spec
from modes.checks.findings import Findings
from modes.prediction.model import needs_of
from modes.training.compose import find_patch_encoder_weights
from modes.training.memory import BACKWARD_SHARE, BATCHES_ON_DEVICE, Demand
from modes.training.run_data import runs_encoder
from utils.config import Config
from utils.devices import available_memory, device_from


def check_patch_encoder_files(
    config: Config, layout: Layout, slides: Sequence[str], have_features: bool, findings: Findings
) -> PatchEncoderSpec | None:
    """Check the encoder's name and size of patches, and its weights where the run, or an extraction before it, needs them."""

    def takes_patches() -> PatchEncoderSpec:
        found = patch_encoder_spec(config.DATA.encoder)
        found.check_size(layout.patch_size, layout.patch_size)
        return found

    spec = findings.attempt("encoder", takes_patches)
    if spec is None:
        return None
    online = needs_of(config).tokens and runs_encoder(config, layout, slides)
    if have_features and not online:
        findings.ok("encoder", f"{spec.name}: not needed in training, everything it gives is cached.")
        return spec
    path = findings.attempt("encoder", lambda: find_patch_encoder_weights(config))
    if path is not None:
        why = "it runs in every step" if online and have_features else "for the extraction"
        findings.ok("encoder", f"{spec.name}: {path} ({why}).")
    return spec


def check_device(gpu: int | None, device: str | None, findings: Findings) -> torch.device | None:
    """Find the device asked for; None if it is not there."""
    if gpu is None and device is None and not torch.cuda.is_available():
        findings.warning("device", "no CUDA device: the CPU is used, which is for small models and trials.")
        return torch.device("cpu")
    found = findings.attempt("device", lambda: device_from(gpu, device))
    if found is not None:
        name = f" ({torch.cuda.get_device_name(found)})" if found.type == "cuda" else ""
        findings.ok("device", f"{found}{name}.")
    return found


def check_token_cache(
    config: Config,
    layout: Layout,
    spots: int,
    slides: Sequence[str],
    spec: PatchEncoderSpec,
    findings: Findings,
) -> None:
    """Say what a token cache would take of the disk, where there is none and the model reads tokens."""
    if not needs_of(config).tokens or not runs_encoder(config, layout, slides) or config.DATA.tokens == "online":
        return
    views = VIEW_COUNTS[-1]
    nbytes = spots * views * spec.num_tokens(layout.patch_size) * spec.dim * 2  # float16
    free = shutil.disk_usage(layout.root).free
    text = (
        f"without token caches the encoder runs in every step. A cache of {views} views would take {gigabytes(nbytes)}, "
        f"{gigabytes(free)} are free in {layout.root}"
    )
    command = layout.repair("token", None, spec.name)
    if nbytes > free:
        findings.warning(
            "tokens",
            f"{text}. One view takes {gigabytes(nbytes / views)} (--views 1: no augmentation), pooled tokens about a quarter "
            f"(--token_pool 2): {command}",
        )
    else:
        findings.warning("tokens", f"{text}: {command}")


def check_memory(need: Demand, device: torch.device, findings: Findings, residence: str = "auto") -> None:
    """Compare the demand with the free memory of the host and of the device. residence: DATA.residence."""
    on_cuda = device.type == "cuda"
    # Features and patches stay on the host where they do not fit on the device, neighbor features in their files.
    is_held = Residence(residence, need.on_host(device)).holds(need.neighbors)
    host, read = need.on_host(device) + is_held * need.neighbors, (not is_held) * need.neighbors
    parts = {
        "features": need.features - read,
        "neighbor features in their files": read,
        "patches": need.patches,
        "encoder": need.encoder,
        "model with Adam": need.model,
        "a training step": round(BACKWARD_SHARE * need.batch),
        "batches under way": BATCHES_ON_DEVICE * need.inputs,
    }
    listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
    limits = [("host memory", host, available_memory())]
    if on_cuda:
        limits.append((f"memory of {device}", need.on_device, torch.cuda.mem_get_info(device)[0]))
    for where, needed, free in limits:
        if needed > free:
            findings.problem(
                "memory",
                f"about {gigabytes(needed)} of {where} are needed, {gigabytes(free)} are free ({listed}). Choose a smaller "
                "--batch_size, --slides_per_batch 5, a smaller model, or a larger machine.",
            )
        else:
            findings.ok("memory", f"{where}: about {gigabytes(needed)} of {gigabytes(free)} free ({listed}).")


def gigabytes(nbytes: float) -> str:
    """Write bytes as GB, for a message."""
    return f"{nbytes / 1e9:.3g} GB"
