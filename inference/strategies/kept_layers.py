"""The setting `keep`: the layers that every token runs, the others left out.

No later token reads a layer that an earlier one left out, so no keys have to be filled in.
"""

from inference.engine.strategy import Strategy
from models.llama import SkippedParts, whole_layers


def keep_problems(
    strategy: Strategy,
    keep: tuple[int, ...],
    n_layers: int,
    *,
    default: tuple[int, ...] | None,
    setting: str,
) -> list[str]:
    """Return what is wrong with the layers to keep.

    Args:
        strategy: Whose setting it is.
        keep: The layers l.
        n_layers: Of the model.
        default: The layers that another setting of the strategy leads to.
        setting: Name of that setting, which has no effect if `keep` differs.
    """
    if not keep or not all(0 <= l < n_layers for l in keep):
        layers = "+".join(map(str, keep)) or "none"
        return [
            f"keep: {layers}, {strategy.name} needs layers from 0 to {n_layers - 1} of this model"
        ]
    if keep != default:
        return strategy.unused_settings(setting, without="leaving keep out")
    return []


def other_layers(keep: tuple[int, ...] | None, n_layers: int) -> SkippedParts:
    """Return the layers l not in `keep`."""
    assert keep is not None
    return whole_layers(set(range(n_layers)) - set(keep))
