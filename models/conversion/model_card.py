"""The README.md of an export: how to decode with it, the loss of each exit, its recipe."""

from pathlib import Path
from typing import Any

from data.foreign_json import parse_object
from models.config import LlamaConfig
from models.conversion.families import Family, family_of
from models.flops import total_params

_SECTIONS = ("layer_dropout", "curriculum", "early_exit", "optim")
_EXIT_LOSS = "validation/loss_exit_"


def write_model_card(
    folder: Path,
    config: LlamaConfig,
    *,
    training: dict[str, Any],
    step: int,
    tokens: int | None,
    checkpoint: Path | None,
    note: str,
) -> None:
    """Write README.md.

    Args:
        folder: The export.
        config: The shape of the exported model.
        training: The resolved configuration it was trained with; {} if unknown.
        step: Optimizer steps it was trained for.
        tokens: Tokens read by them; None: as many as steps of one size.
        checkpoint: The checkpoint of these very weights, whose run holds the losses of the exits;
            None: no table.
        note: How the model was changed after training; may be empty.
    """
    name, family = training.get("name", "model"), family_of(config)
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags: [{family.model_type}, early-exit, self-speculative-decoding]\n---",
        f"# {name}",
        f"A plain {family.name} of {total_params(config):,} parameters: {config.n_layers} layers, "
        f"width {config.dim}, {config.n_heads} heads ({config.n_kv_heads} for keys and values), "
        f"{config.vocab_size} tokens, context {config.max_seq_len}. {note}".rstrip(),
        _usage(config.n_layers, family),
    ]
    if losses := {} if checkpoint is None else exit_losses(checkpoint, step):
        parts.append(_table(losses))
    if training:
        parts.append(_recipe(training, step, tokens))
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _usage(n_layers: int, family: Family) -> str:
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, {family.tokenizer_class}

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = {family.tokenizer_class}.from_pretrained("PATH")
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
out = model.generate(**inputs, max_new_tokens=50, do_sample=False, assistant_early_exit=E)
print(tokenizer.decode(out[0], skip_special_tokens=True))
```

Every layer's output can be read through the one final norm and LM head. With
`assistant_early_exit=E` the first E layers draft and all {n_layers} verify: the tokens are those
of plain greedy decoding. E is 1 to {n_layers - 1}, and the batch must be 1. Without it, this is a
{family.name} like any other. The tokenizer puts BOS first, as training did."""


def exit_losses(checkpoint: Path, step: int) -> dict[int, float]:
    """Return {E: validation loss in nats per token} of the exits, from the run of a checkpoint.

    Of `metrics.jsonl` two folders up, the validation at exactly this step; {} where there is none.
    """
    path = checkpoint.parent.parent / "metrics.jsonl"
    found: dict[int, float] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = parse_object(line)
        except ValueError:  # the line a kill has torn
            continue
        if row.get("step") == step:
            # By their order, E = 1, ..., L: version 0.1 named them from 0.
            exits = [
                float(loss)
                for name, loss in row.items()
                if name.startswith(_EXIT_LOSS) and isinstance(loss, int | float)
            ]
            found |= dict(enumerate(exits, 1))
    return found


def _table(losses: dict[int, float]) -> str:
    rows = [f"| {E} | {loss:.4f} |" for E, loss in losses.items()]
    head = "## Exits\n\n| layers run, E | validation loss, nats per token |\n|---|---|\n"
    return head + "\n".join(rows)


def _recipe(training: dict[str, Any], step: int, tokens: int | None) -> str:
    lines = [f"- steps: {step}"]
    data = _section(training, "data")
    rows, seq_len = data.get("global_batch_size"), data.get("seq_len")
    if isinstance(rows, int) and isinstance(seq_len, int):
        if tokens is None:  # a checkpoint of version 0.1
            tokens = step * rows * seq_len
        lines.append(f"- tokens: {tokens:,}, {seq_len} in a sequence")
    for section in _SECTIONS:
        if fields := _section(training, section):
            lines.append(f"- {section}: " + ", ".join(f"{k} {v}" for k, v in fields.items()))
    return "## Recipe\n\n" + "\n".join(lines)


def _section(training: dict[str, Any], name: str) -> dict[str, Any]:
    fields = training.get(name)
    return fields if isinstance(fields, dict) else {}
