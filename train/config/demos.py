"""One small model on the embedded corpus, trained with every recipe.

Initial weights and the order of tokens are the same; only the recipe differs.
`benchmarks/recipes.py` compares them.
"""

import dataclasses

from loss.curriculum import CurriculumConfig
from loss.density import DensityConfig
from loss.early_exit import EarlyExitConfig
from models.layer_dropout import LayerDropoutConfig
from models.sizes import SIZES
from models.token_depth import TokenDepthConfig
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.config.config import TrainConfig
from train.decoding.speculation_config import SpeculationConfig
from train.loop.data_config import DataConfig
from train.loop.validate import ValidateConfig
from train.optimizer.optim import OptimConfig
from train.run_folder.metrics import MetricsConfig

EMBEDDED = ("embedded",)


def demo() -> TrainConfig:
    """LayerSkip from scratch in minutes on two CPU cores, on the embedded corpus."""
    return TrainConfig(
        name="demo",
        steps=500,
        model=SIZES["demo"],
        data=DataConfig(
            input=EMBEDDED,
            seq_len=256,
            global_batch_size=8,
        ),
        optim=OptimConfig(lr=4e-3, warmup_steps=50),
        layer_dropout=LayerDropoutConfig(p_max=0.1),
        curriculum=CurriculumConfig(C="rot", R=7),
        early_exit=EarlyExitConfig(e_scale=0.2),
        validate=ValidateConfig(interval_steps=250),
        speculation=SpeculationConfig(interval_steps=100),
        checkpoint=CheckpointConfig(interval_steps=250),
        metrics=MetricsConfig(interval_steps=25),
    )


def dense_demo() -> TrainConfig:
    """The same model and data as `demo`, trained plainly: no layer dropout, no early exits."""
    return _with("dense_demo")


def dropout_demo() -> TrainConfig:
    """LayerSkip's layer dropout alone."""
    return _with("dropout_demo", layer_dropout=demo().layer_dropout)


def exits_demo() -> TrainConfig:
    """LayerSkip's early-exit loss alone."""
    return _with("exits_demo", curriculum=demo().curriculum, early_exit=demo().early_exit)


def calm_demo() -> TrainConfig:
    """CALM's and PABEE's loss: every exit at every step, weighted by its depth."""
    return _with(
        "calm_demo",
        curriculum=CurriculumConfig(C="all"),
        early_exit=EarlyExitConfig(weights="linear"),
    )


def free_demo() -> TrainConfig:
    """FREE: the shallow-deep loss of one exit, hidden states distilled into the layers below it.

    Each teacher is matched with its nearest student (the authors' KD-dyna, alpha 0.5).
    """
    return _with(
        "free_demo",
        curriculum=CurriculumConfig(C="all"),
        early_exit=EarlyExitConfig(weights="linear", exits=(2,), distill_states="dynamic"),
    )


def ee_llm_demo() -> TrainConfig:
    """EE-LLM's few exits of fixed weights, after a quarter and half of the layers."""
    return _with(
        "ee_llm_demo",
        curriculum=CurriculumConfig(C="all"),
        early_exit=EarlyExitConfig(
            weights="fixed", exits=(2, 4), exit_weights=(0.25, 0.5), warmup_steps=50
        ),
    )


def layerdrop_demo() -> TrainConfig:
    """LayerDrop: all layers equally often, for the whole batch at once."""
    return _with(
        "layerdrop_demo",
        layer_dropout=LayerDropoutConfig(
            p_max=0.2, D="uniform", S="constant", granularity="per_batch"
        ),
    )


def pld_demo() -> TrainConfig:
    """Progressive layer dropping, theta_bar 0.5."""
    return _with(
        "pld_demo",
        layer_dropout=LayerDropoutConfig(
            p_max=0.5,
            D="linear_from_first",
            S="progressive",
            granularity="per_batch",
            scale_kept=True,
        ),
    )


def decreasing_demo() -> TrainConfig:
    """Layer dropout that decreases over time, scaled by 1 / (1 - p), with LayerSkip's exits."""
    return _with(
        "decreasing_demo",
        layer_dropout=LayerDropoutConfig(
            p_max=0.2, D="linear", S="linear_decreasing", scale_kept=True
        ),
        curriculum=demo().curriculum,
        early_exit=demo().early_exit,
    )


def skipdecode_demo() -> TrainConfig:
    """SkipDecode's budgets: the last tokens of a row run half of the layers."""
    return _with("skipdecode_demo", token_depth=TokenDepthConfig(kind="skipdecode"))


def mixed_demo() -> TrainConfig:
    """The Depth-Adaptive Transformer's mixed training: a random exit for each token."""
    return _with("mixed_demo", token_depth=TokenDepthConfig(kind="mixed"))


def router_demo() -> TrainConfig:
    """SkipLayer's routers: tokens choose their layers, with a target of one half of them."""
    config = _with("router_demo")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, router="linear"),
        density=DensityConfig(weight=1.0, target=0.5),
    )


def _with(
    name: str,
    *,
    layer_dropout: LayerDropoutConfig | None = None,
    curriculum: CurriculumConfig | None = None,
    early_exit: EarlyExitConfig | None = None,
    token_depth: TokenDepthConfig | None = None,
) -> TrainConfig:
    """Return `demo` with these parts; those not given are the plain defaults."""
    return dataclasses.replace(
        demo(),
        name=name,
        layer_dropout=layer_dropout or LayerDropoutConfig(),
        curriculum=curriculum or CurriculumConfig(),
        early_exit=early_exit or EarlyExitConfig(),
        token_depth=token_depth or TokenDepthConfig(),
    )


DEMOS = (
    demo,
    dense_demo,
    dropout_demo,
    exits_demo,
    calm_demo,
    free_demo,
    ee_llm_demo,
    layerdrop_demo,
    pld_demo,
    decreasing_demo,
    skipdecode_demo,
    mixed_demo,
    router_demo,
)
