"""What TensorBoard shows beside curves: the layout of Custom Scalars, and a session of HParams."""

import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from torch.utils.tensorboard.summary import custom_scalars

from train.run_folder.events import State
from train.run_folder.settings_text import flat

EXITS_SHOWN = 5
"""Most exits in one chart: TensorBoard tells the lines of one run apart by five symbols."""
_COMPARED = (
    *("steps", "seed", "model.", "data.", "optim.", "layer_dropout.", "curriculum.", "early_exit."),
    *("token_depth.", "router.", "density."),
)
"""The settings that decide what is learnt."""
_STATUS = {"finished": "STATUS_SUCCESS", "failed": "STATUS_FAILURE"}


def layout(L: int, *, speculates: bool) -> Summary:
    """Return the layout of Custom Scalars.

    Args:
        L: Number of layers.
        speculates: Whether acceptance and agreement are measured.
    """
    exits = range(L, 0, -L // EXITS_SHOWN)  # the last, and others evenly apart
    by_split = {
        split: [f"losses_{split}/exit_{E:02d}$" for E in exits] for split in ("held_out", "train")
    }
    drafts = {
        title: ["Multiline", [f"^speculation/{name}_"]]
        for title, name in (("Acceptance", "acceptance"), ("Agreement, by exit", "agreement"))
    }
    return custom_scalars(
        {
            "Loss": {
                "Held out (the line), and how far from training": [
                    "Margin",
                    ["loss/held_out", "margin/low", "margin/high"],
                ],
                "Held out, by exit": ["Multiline", by_split["held_out"]],
                "Training, by exit": ["Multiline", by_split["train"]],
            },
            **({"Speculation": drafts} if speculates else {}),
            "Marks": {
                "Restarts and rollbacks": ["Multiline", ["^marks/(restarts|rollbacks)$"]],
                "Sequences in a batch": ["Multiline", ["^marks/batch_size$"]],
            },
        }
    )


def session_start(config: Mapping[str, Any]) -> Summary:
    """Return the settings of a run; the table of HParams begins with those that differ by run."""
    settings = {name: value for name, value in flat(config).items() if name.startswith(_COMPARED)}
    return hparams_pb(settings, trial_id=str(config["name"]))


def session_end(state: State) -> list[Summary]:
    """Return how a run ended; nothing where it is to go on."""
    if state not in _STATUS:
        return []
    info = SessionEndInfo(status=Status.Value(_STATUS[state]), end_time_secs=time.time())
    value = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(HParamsPluginData(session_end_info=info)),
        tensor=metadata.NULL_TENSOR,
    )
    return [Summary(value=[value])]
