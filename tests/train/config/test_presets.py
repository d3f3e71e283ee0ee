"""The presets carry the paper's hyperparameters."""

import pytest

from train.config.presets import PRESETS

# LayerSkip (arXiv 2404.16710), section 5 and tables 8 to 10:
# p_max, e_scale, C, R, S, learning rate, sequences per step, steps
PAPER = {
    "scratch_1_5b": (0.1, 0.2, "rot", 23, "exponential", 8e-4, 4 * 32, 50_000),
    "scratch_7b": (0.2, 0.2, "rot", 31, "exponential", 8e-4, 4 * 32, 50_000),
    "continual_llama2_7b": (0.1, 0.2, "rot", 8, "constant", 3e-5, 4 * 64, 50_000),
    "continual_llama2_13b": (0.1, 0.1, "rot", 39, "constant", 2e-5, 4 * 64, 50_000),
    "finetune_code": (0.1, 1.0, "rot", 16, "constant", 1e-4, 4 * 32, 10_000),
    "finetune_topv2": (0.2, 1.0, "grad", None, "constant", 1e-4, 32 * 8, 5_800),
}
TOKENS = {
    "scratch_1_5b": 26e9,
    "scratch_7b": 26e9,
    "continual_llama2_7b": 52e9,
    "continual_llama2_13b": 52e9,
    "continual_llama3_8b": 419e9,
    "continual_llama3_2_1b": 839e9,
    "finetune_code": 5.2e9,
}


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_carry_the_papers_hyperparameters(name):
    config = PRESETS[name]()
    R = config.curriculum.R if config.curriculum.C == "rot" else None
    assert PAPER[name] == (
        config.layer_dropout.p_max,
        config.early_exit.e_scale,
        config.curriculum.C,
        R,
        config.layer_dropout.S,
        config.optim.lr,
        config.data.global_batch_size,
        config.steps,
    )


@pytest.mark.parametrize("name", TOKENS)
def test_paper_presets_see_the_papers_number_of_tokens(name):
    config = PRESETS[name]()
    assert config.steps * config.data.tokens_per_step == pytest.approx(TOKENS[name], rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_sound_and_bears_its_name(name):
    config = PRESETS[name]()
    assert config.name == name
    ranks = 2 if "demo" in name else 8
    assert (
        config.problems(world_size=ranks if "110m" not in name and "350m" not in name else 1) == []
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_for_gpus_compile_there_and_demos_nowhere(name):
    config = PRESETS[name]()
    on_cpus, on_gpus = (
        config.parallel.settled(config.model, 8, on_gpu=on_gpu).compile for on_gpu in (False, True)
    )
    assert (on_cpus, on_gpus) == (False, "demo" not in name)
