"""The zoo scaled down: the same architectures, small enough for eight virtual devices or for a
compiler that is to be done in seconds.

`TINY` keeps values comparable on CPUs. `SMALL` is small in depth only: layers narrower than these
are dominated by what the zoo's own hardly have, collectives so short that compilers combine them
and keep what they reduce.
"""

from __future__ import annotations

from collections.abc import Mapping

from planner import zoo
from planner.model import Model
from planner.modelfile import load_model

Settings = Mapping[str, int | str]

_TEXT = {"d_model": 32, "d_ff": 64, "heads": 8, "head_dim": 8, "vocab": 64, "sequence": 16}
_WIDE = {
    "d_model": 2048, "d_ff": 8192, "heads": 16, "head_dim": 128, "vocab": 32768, "sequence": 1024,
}  # fmt: skip
_STACK = {"layers": 2}
_TWO_STACKS = {"encoder_layers": 2, "decoder_layers": 2}
_GSHARD = {"dims.S": 16, "dims.tokens": 256, "dims.N": 16}
_GSHARD_SMALL = {"dims.S": 1024, "dims.tokens": "128Ki", "dims.N": 1024}

#: Zoo model → keys of its `architecture:` block (or whole paths), for batches of 16 or so.
TINY: dict[str, Settings] = {
    "bert-480b": {**_TEXT, **_STACK},
    "deepseek-v3": {
        **_TEXT, "layers": 3, "dense_first": 1, "kv_rank": 16, "q_rank": 16, "rope_dim": 8,
        "experts": 8, "top_k": 2, "expert_d_ff": 32, "group_size": 16,
        "training.accumulation_steps": 1,
    },
    "glam-1.2t": {**_TEXT, **_STACK, "experts": 8},
    "gpt3-175b": {**_TEXT, **_STACK},
    "gshard-m4": {
        **_TEXT, **_TWO_STACKS, "sequence": "S", "target_vocab": 32, "experts": 8, **_GSHARD,
    },
    "lamda-137b": {**_TEXT, **_STACK},
    "llama3-70b": {**_TEXT, **_STACK, "kv_heads": 4, "training.accumulation_steps": 2},
    "llama3-8b": {**_TEXT, **_STACK, "kv_heads": 2, "training.accumulation_steps": 1},
    "mixtral-8x7b": {**_TEXT, **_STACK, "kv_heads": 4, "group_size": 16},
    "resnet-50": {"blocks": "[1, 1]", "width": 8, "image": 32, "classes": 16},
    "wide-resnet-50-2": {"blocks": "[1, 1]", "width": 8, "image": 32, "classes": 16},
    "t5-11b": {**_TEXT, **_TWO_STACKS, "target_sequence": 8},
    "unet-2d": {"image": "[16, 16]", "width": 8, "levels": 2},
    "unet-3d": {"image": "[8, 8, 8]", "width": 8, "levels": 2},
    "vit-22b": {"layers": 2, "d_model": 32, "d_ff": 64, "heads": 8, "image": 28, "classes": 16},
}  # fmt: skip
SMALL: dict[str, Settings] = {
    "bert-480b": {**_WIDE, **_STACK},
    "glam-1.2t": {**_WIDE, **_STACK, "experts": 8},
    "gpt3-175b": {**_WIDE, **_STACK},
    "gshard-m4": {
        **_WIDE, "encoder_layers": 2, "decoder_layers": 2, "sequence": "S", "target_vocab": 16384,
        "experts": 8, **_GSHARD_SMALL,
    },
    "lamda-137b": {**_WIDE, **_STACK},
    "llama3-8b": {**_WIDE, **_STACK, "kv_heads": 4, "training.accumulation_steps": 2},
    "mixtral-8x7b": {**_WIDE, **_STACK, "kv_heads": 4, "group_size": 512},
    "t5-11b": {**_WIDE, **_TWO_STACKS, "target_sequence": 256},
    "vit-22b": {"layers": 2, "d_model": 2048, "d_ff": 8192, "heads": 16, "classes": 8192},
}  # fmt: skip


def scaled(name: str, settings: Settings, batch: int, *more: str) -> Model:
    """The zoo model with `settings`; `more` are further overrides like training.remat=none."""
    keys = {k if "." in k else f"architecture.{k}": v for k, v in settings.items()}
    overrides = [f"{k}={v}" for k, v in keys.items()]
    if not any(k.startswith("dims.") for k in keys):
        overrides.append(f"training.batch={batch}")
    return load_model(zoo.text(name), f"{name}.yaml", (*overrides, *more))
