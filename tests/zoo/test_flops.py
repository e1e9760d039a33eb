"""FLOP counts of steps against formulas by hand."""

from __future__ import annotations

import pytest
from zoo_support import model

from planner.architectures import ARCHITECTURES, build
from planner.graph.derive import training_step
from planner.graph.flops import FlopCount, count_flops
from planner.model import Model, Training

B, S, L, D, F, N, H, K, V = 4, 16, 3, 32, 48, 4, 8, 2, 64


def counted(remat: str = "none", steps: int = 1, **settings: object) -> FlopCount:
    s = ARCHITECTURES["decoder"](
        layers=L, d_model=D, d_ff=F, heads=N, head_dim=H, vocab=V, sequence=S, **settings
    )
    how = Training(B, "adamw", remat=remat, accumulation_steps=steps)
    return count_flops(training_step(Model("m", build(s, B // steps, how), how, B * S)))


def by_hand(kv: int = N, matrices: int = 2) -> float:
    """6 per parameter of a projection and token, and two attention products, not halved."""
    projections = L * (2 * D * N * H + 2 * D * kv * H + matrices * D * F) + D * V
    attention = L * 2 * S * N * H
    return 6 * B * S * (projections + attention)


def test_a_decoder_counts_six_per_weight_and_token_plus_attention() -> None:
    assert counted() == FlopCount(by_hand(), by_hand())


def test_grouped_queries_and_gates() -> None:
    assert counted(kv_heads=K, gated=True).model == by_hand(K, 3)
    assert counted(kv_heads=1).model == by_hand(1)


def test_untied_embeddings_lookups_and_biases_count_nothing() -> None:
    assert counted(tied_embeddings=False, biases=True, positions="learned").model == by_hand()


def test_accumulation_changes_nothing() -> None:
    assert counted(steps=2) == counted(steps=1)


def test_recomputation_is_hardware_work_only() -> None:
    layers = by_hand() - 6 * B * S * D * V
    full, dots, attention = (counted(p) for p in ("full", "dots", "attention"))
    assert full.model == dots.model == attention.model == by_hand()
    # The last product of a layer is not recomputed: nothing reads its result.
    assert full.hardware - full.model == layers / 3 - 2 * L * B * S * D * F
    # The weights' products are saved, those of attention are not; the second feeds wo's gradient.
    assert dots.hardware - dots.model == 2 * L * B * S * 2 * S * N * H
    assert attention.hardware - attention.model == dots.hardware - dots.model


def test_a_forward_graph_counts_once() -> None:
    forward = model("t5-11b").graph
    step = training_step(Model("m", forward, Training(2, "sgd", remat="none"), 1))
    assert count_flops(step).model == 3 * count_flops(forward).model


@pytest.mark.parametrize(
    ("name", "gflops"),
    [
        # 4.09e9 multiply-adds per image: torchvision's table of models.
        ("resnet-50", 2 * 4.09),
        # 1.0 teraFLOPs forward per image are 2 · 22e9 · 256 tokens and attention's 3 %.
        ("vit-22b", 2 * 21.74 * 256 * (1 + 2 * 256 * 6144 * 48 / 21.74e9)),
    ],
)
def test_forward_work_per_image_as_published(name: str, gflops: float) -> None:
    found = count_flops(model(name).graph).model / model(name).training.batch
    assert found == pytest.approx(gflops * 1e9, rel=0.01)
