"""HiraCallback, which reports what HiRA's adapters do while transformers' Trainer, or one of TRL's, trains them."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hira.errors import HiraError
from hira.training.learning_rate import check_learning_rate
from hira.training.measures import check_whole, measure
from hira.tuner.model import hira_layers


class HiraCallback(TrainerCallback):
    """Logs three measures of each adapted layer at an interval, and warns once of a learning rate that is LoRA's.

    After ``trainer.add_callback(HiraCallback(trainer, every=100))``, every hundredth step adds a row to
    ``trainer.state.log_history`` and sends it to everything that the trainer reports to. For a module ``m`` with W0,
    and U = W0 * BA of its active adapters together, the row has

    - ``hira/relative_norm/m``: ``||U|| / ||W0||``, Frobenius norms;
    - ``hira/effective_rank/m``: that of BA, ``exp(-sum_i p_i ln p_i)`` with ``p_i = s_i / sum_j s_j`` for its singular
      values s: between 1 and r, 0 while BA is zero;
    - ``hira/below_bfloat16/m``: the share of entries which U does not change once W0 + U is rounded to the nearest
      bfloat16. hira itself rounds with a dither where W0 is in half precision, which keeps such updates on average.

    At the first step `hira.check_learning_rate` is called with the trainer's optimiser and its number of steps.

    Args:
        trainer: the trainer, of transformers or TRL, that the callback is added to.
        every: the number of steps from one row to the next; None for the check of the learning rate alone.

    Raises:
        HiraError: `every` is not a positive integer or None; at the beginning of the training, when weights that are
            to be measured are divided over processes.

    Cost: for 2048 x 2048 and r = 16 on two CPU cores 2 ms on an idle machine, 10 ms on a busy one. The effective rank
    is exact. The other two are of about 500,000 entries of each weight, in rows drawn at random and the same each time:
    where the rows' squared norms vary by as much as their mean, 256 of 2048 rows give the norm to 3 %. A quantised
    weight is dequantised for it. Only the main process measures and logs.
    """

    def __init__(self, trainer: Trainer, every: int | None = 100) -> None:
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise HiraError(f"every must be a positive number of steps or None, not {every!r}.")
        self.trainer = trainer
        self.every = every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse weights that are divided over processes; have the learning rate checked."""
        if self.every is not None:
            check_whole(hira_layers(kwargs["model"]))
        if state.is_world_process_zero:
            check_learning_rate(kwargs["model"], kwargs["optimizer"], state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the measures, if it is time."""
        if self.every is None or state.global_step % self.every or not state.is_world_process_zero:
            return
        logs = {}
        for layer in hira_layers(kwargs["model"]):
            if names := layer._present(layer.active_adapters):
                module = ".".join(filter(None, (layer.name, layer.parameter_name)))
                logs.update({f"hira/{key}/{module}": value for key, value in measure(layer, names)._asdict().items()})
        should_log = control.should_log
        # not a subclass's `log`: those of TRL's trainers would put the means of their own metrics into this row, early
        Trainer.log(self.trainer, logs)
        control.should_log = should_log  # which logging has reset
