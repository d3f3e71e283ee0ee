"""Named runs, as functions. An experiment is a new preset, not a flag.

The presets of the paper carry its hyperparameters (LayerSkip, arXiv 2404.16710, section 5 and
tables 8 to 10). It gives no optimizer, warmup, decay or weight decay: those are ours. Batch sizes
are its batch per GPU times its GPUs; where it gives tokens instead, they are derived. The number
of sequences per GPU and forward pass, microbatch_size, is ours.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from loss.curriculum import Curriculum, CurriculumConfig
from loss.early_exit import EarlyExitConfig
from models.layer_dropout import LayerDropoutConfig
from models.sizes import SIZES
from models.token_depth import TokenDepthConfig
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.config.config import TrainConfig
from train.config.demos import DEMOS, demo
from train.decoding.speculation_config import SpeculationConfig
from train.loop.data_config import DataConfig
from train.optimizer.optim import OptimConfig
from train.parallel.parallelize import ParallelConfig


def layerskip_110m() -> TrainConfig:
    """110M from scratch on one big GPU: 20 tokens per parameter."""
    return _from_scratch("110m", steps=5_000, R=11, lr=1e-3, microbatch_size=32)


def layerskip_350m() -> TrainConfig:
    """350M from scratch on one big GPU: 20 tokens per parameter."""
    return _from_scratch("350m", steps=14_000, R=23, lr=8e-4, microbatch_size=16)


def scratch_1_5b() -> TrainConfig:
    """The paper's 1.5B from scratch: 32 GPUs, 26B tokens."""
    return _paper("scratch_1_5b", microbatch_size=4)


def scratch_7b() -> TrainConfig:
    """The paper's Llama-2 7B from scratch: 32 GPUs, 26B tokens."""
    return _paper("scratch_7b")


def continual_llama2_7b() -> TrainConfig:
    """The paper's continual pretraining of Llama-2 7B: 64 GPUs, 52B tokens."""
    return _paper("continual_llama2_7b", init_from="outputs/llama2_7b")


def continual_llama2_13b() -> TrainConfig:
    """The paper's continual pretraining of Llama-2 13B: 64 GPUs, 52B tokens."""
    parallel = ParallelConfig(reduce_every_microbatch=True)
    return _paper("continual_llama2_13b", init_from="outputs/llama2_13b", parallel=parallel)


def continual_llama3_8b() -> TrainConfig:
    """The paper's continual pretraining of Llama-3 8B: 419B tokens. Its LR is not given."""
    parallel = ParallelConfig(activation_checkpointing="selective")
    return _paper("continual_llama3_8b", init_from="outputs/llama3_8b", parallel=parallel)


def continual_llama3_2_1b() -> TrainConfig:
    """The paper's continual pretraining of Llama-3.2 1B: 839B tokens. Its LR is not given."""
    return _paper("continual_llama3_2_1b", init_from="outputs/llama3.2_1b")


def continual_llama2_70b() -> TrainConfig:
    """Continual pretraining of Llama-2 70B: 64 GPUs, 52B tokens. Its settings are ours.

    Those of the 13B, but for R, which likewise leaves one exit a step, and a lower LR.
    """
    parallel = ParallelConfig(reduce_every_microbatch=True, activation_checkpointing="full")
    return _paper("continual_llama2_70b", init_from="outputs/llama2_70b", parallel=parallel)


def continual_mistral_7b() -> TrainConfig:
    """Continual pretraining of Mistral 7B: 52B tokens, settings of Llama-2 7B."""
    parallel = ParallelConfig(activation_checkpointing="selective")
    return _paper("continual_mistral_7b", init_from="outputs/mistral_7b", parallel=parallel)


def continual_qwen2_5_1_5b() -> TrainConfig:
    """Continual pretraining of Qwen2.5 1.5B: 52B tokens, settings of Llama-3.2 1B."""
    return _paper("continual_qwen2_5_1_5b", init_from="outputs/qwen2.5_1.5b", microbatch_size=4)


def continual_qwen3_0_6b() -> TrainConfig:
    """Continual pretraining of Qwen3 0.6B: 52B tokens, settings of Llama-3.2 1B."""
    return _paper("continual_qwen3_0_6b", init_from="outputs/qwen3_0.6b", microbatch_size=4)


def continual_olmo2_1b() -> TrainConfig:
    """Continual pretraining of OLMo 2 1B: 52B tokens, settings of Llama-3.2 1B."""
    return _paper("continual_olmo2_1b", init_from="outputs/olmo2_1b", microbatch_size=4)


def continual_smollm2_1_7b() -> TrainConfig:
    """Continual pretraining of SmolLM2 1.7B: 52B tokens, settings of Llama-3.2 1B."""
    return _paper("continual_smollm2_1_7b", init_from="outputs/smollm2_1.7b", microbatch_size=4)


def finetune_code() -> TrainConfig:
    """The paper's finetuning of Llama-1 7B on code: 32 GPUs, 5.2B tokens in sequences of 4096."""
    config = _paper("finetune_code", init_from="outputs/llama1_7b")
    model = dataclasses.replace(config.model, max_seq_len=config.data.seq_len)
    return dataclasses.replace(config, model=model)


def finetune_topv2() -> TrainConfig:
    """The paper's finetuning of its 1.5B on TOPv2: 8 GPUs, batch 32 each. seq_len is ours."""
    config = _paper("finetune_topv2", init_from="outputs/scratch_1_5b", microbatch_size=8)
    return dataclasses.replace(config, data=_whole_documents(config.data))


def continual_demo() -> TrainConfig:
    """Continual pretraining in minutes: `dense_demo`, trained plainly, continues with LayerSkip."""
    return dataclasses.replace(
        demo(),
        name="continual_demo",
        optim=OptimConfig(lr=1e-3, warmup_steps=50),
        layer_dropout=LayerDropoutConfig(p_max=0.1, S="constant"),
        checkpoint=CheckpointConfig(interval_steps=250, init_from="outputs/dense_demo"),
    )


def ee_tuning_demo() -> TrainConfig:
    """EE-Tuning in minutes: three exits with own parts learn on top of `dense_demo`, frozen."""
    exits = (2, 4, 6)
    return dataclasses.replace(
        demo(),
        name="ee_tuning_demo",
        steps=200,
        model=dataclasses.replace(demo().model, own_exits=exits, own_exit_mlp=True),
        optim=OptimConfig(lr=2e-3, warmup_steps=20, trains="exits"),
        layer_dropout=LayerDropoutConfig(),
        curriculum=CurriculumConfig(C="all"),
        early_exit=EarlyExitConfig(weights="fixed", exits=exits, exit_weights=(1.0, 1.0, 1.0)),
        checkpoint=CheckpointConfig(interval_steps=100, init_from="outputs/dense_demo"),
    )


def parsing_demo() -> TrainConfig:
    """Finetuning on a task in minutes: `demo` on the pairs of `data.semantic_parsing`."""
    data = DataConfig(path="outputs/data/parsing", seq_len=256, global_batch_size=8)
    return dataclasses.replace(
        demo(),
        name="parsing_demo",
        data=_whole_documents(data),
        optim=OptimConfig(lr=2e-3, warmup_steps=50),
        layer_dropout=LayerDropoutConfig(p_max=0.2, S="constant"),
        curriculum=CurriculumConfig(C="grad"),
        early_exit=EarlyExitConfig(e_scale=1.0),
        speculation=SpeculationConfig(interval_steps=250, new_tokens=96),
        checkpoint=CheckpointConfig(interval_steps=250, init_from="outputs/demo"),
    )


def unified_demo() -> TrainConfig:
    """Unified Layer Skipping's finetuning: as `parsing_demo`, responses run half of the layers."""
    return dataclasses.replace(
        parsing_demo(),
        name="unified_demo",
        layer_dropout=LayerDropoutConfig(),
        curriculum=CurriculumConfig(),
        early_exit=EarlyExitConfig(),
        token_depth=TokenDepthConfig(kind="unified"),
    )


def _whole_documents(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, packing="documents", mask_documents=True)


def _from_scratch(size: str, *, steps: int, R: int, lr: float, microbatch_size: int) -> TrainConfig:
    model = SIZES[size]
    return TrainConfig(
        name=f"layerskip_{size}",
        steps=steps,
        model=model,
        data=DataConfig(
            path="outputs/data/pretraining",
            seq_len=model.max_seq_len,
            global_batch_size=256,
            microbatch_size=microbatch_size,
        ),
        optim=OptimConfig(lr=lr, warmup_steps=500),
        layer_dropout=LayerDropoutConfig(p_max=0.1),
        curriculum=CurriculumConfig(C="rot", R=R),
        early_exit=EarlyExitConfig(e_scale=0.2),
        parallel=ParallelConfig(reshard_after_forward=False, compile=None),
    )


class _Row(NamedTuple):
    """A run of the paper, or one after its pattern, in the table below."""

    size: str
    p_max: float
    e_scale: float
    C: Curriculum
    R: int
    lr: float
    steps: int
    global_batch_size: int
    seq_len: int


# fmt: off
_PAPER = {
    #                             size            p_max e_scale C   R   lr    steps  batch  seq_len
    "scratch_1_5b":          _Row("layerskip_1.5b", 0.1, 0.2, "rot", 23, 8e-4, 50_000, 128, 4096),
    "scratch_7b":            _Row("llama2_7b",      0.2, 0.2, "rot", 31, 8e-4, 50_000, 128, 4096),
    "continual_llama2_7b":   _Row("llama2_7b",      0.1, 0.2, "rot",  8, 3e-5, 50_000, 256, 4096),
    "continual_llama2_13b":  _Row("llama2_13b",     0.1, 0.1, "rot", 39, 2e-5, 50_000, 256, 4096),
    "continual_llama2_70b":  _Row("llama2_70b",     0.1, 0.1, "rot", 79, 1.5e-5, 50_000, 256, 4096),
    "continual_llama3_8b":   _Row("llama3_8b",      0.1, 0.1, "rot",  8, 3e-5, 50_000, 1024, 8192),
    "continual_llama3_2_1b": _Row("llama3.2_1b",    0.1, 0.1, "rot",  8, 3e-5, 50_000, 2048, 8192),
    "continual_mistral_7b":  _Row("mistral_7b",     0.1, 0.2, "rot",  8, 3e-5, 50_000, 128, 8192),
    "continual_qwen2_5_1_5b": _Row("qwen2.5_1.5b",  0.1, 0.1, "rot",  8, 3e-5, 50_000, 256, 4096),
    "continual_qwen3_0_6b":  _Row("qwen3_0.6b",     0.1, 0.1, "rot",  8, 3e-5, 50_000, 256, 4096),
    "continual_olmo2_1b":    _Row("olmo2_1b",       0.1, 0.1, "rot",  8, 3e-5, 50_000, 256, 4096),
    "continual_smollm2_1_7b": _Row("smollm2_1.7b",  0.1, 0.1, "rot",  8, 3e-5, 50_000, 256, 4096),
    "finetune_code":         _Row("llama1_7b",      0.1, 1.0, "rot", 16, 1e-4, 10_000, 128, 4096),
    "finetune_topv2":        _Row("layerskip_1.5b", 0.2, 1.0, "grad", 8, 1e-4,  5_800, 256,  512),
}
# fmt: on


def _paper(
    name: str,
    *,
    init_from: str = "",
    microbatch_size: int = 1,
    parallel: ParallelConfig | None = None,
) -> TrainConfig:
    row = _PAPER[name]
    return TrainConfig(
        name=name,
        steps=row.steps,
        model=SIZES[row.size],
        data=DataConfig(
            path=f"outputs/data/{name}",
            seq_len=row.seq_len,
            global_batch_size=row.global_batch_size,
            microbatch_size=microbatch_size,
        ),
        optim=OptimConfig(lr=row.lr, warmup_steps=min(2000, row.steps // 10)),
        # Dropout grows with t from scratch, and is constant on weights that are trained already.
        layer_dropout=LayerDropoutConfig(
            p_max=row.p_max, S="constant" if init_from else "exponential"
        ),
        curriculum=CurriculumConfig(C=row.C, R=row.R),
        early_exit=EarlyExitConfig(e_scale=row.e_scale),
        parallel=dataclasses.replace(parallel or ParallelConfig(), compile=None),
        checkpoint=CheckpointConfig(interval_steps=1000, init_from=init_from),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    preset.__name__: preset
    for preset in (
        *DEMOS,
        layerskip_110m,
        layerskip_350m,
        scratch_1_5b,
        scratch_7b,
        continual_llama2_7b,
        continual_llama2_13b,
        continual_llama2_70b,
        continual_llama3_8b,
        continual_llama3_2_1b,
        continual_mistral_7b,
        continual_qwen2_5_1_5b,
        continual_qwen3_0_6b,
        continual_olmo2_1b,
        continual_smollm2_1_7b,
        finetune_code,
        finetune_topv2,
        continual_demo,
        ee_tuning_demo,
        parsing_demo,
        unified_demo,
    )
}
