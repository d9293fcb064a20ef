"""What several processes run: `torchrun distributed_pretraining.py FOLDER BATCH_SIZE SOURCE...`.

With `DIE_IN_STEP` in the environment, the second process kills itself in that step.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import wraps
from pathlib import Path

from gfx.models import pretrain

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def train(folder: Path, batch_size: int, sources: list[Path]) -> None:
    """Two epochs, in batches of so many cells a process."""
    training = {
        "per_device_train_batch_size": batch_size,
        "logging_steps": 1,
        "save_steps": 4,
        "eval_steps": 4,
        "learning_rate": 3e-3,
        "use_cpu": True,
    }
    pretrain(sources, folder, config=CONFIG, curriculum=[(None, 2)], training=training, held_out=0.2)


def die_in_step(step: int) -> None:
    """Let this process be killed, as by a scheduler."""
    from gfx._engine.pretraining import MaskedGeneModel

    steps, forward = [], MaskedGeneModel.forward

    @wraps(forward)
    def mortal(self, *args, **kwargs):
        steps.extend([1] * self.training)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *args, **kwargs)

    MaskedGeneModel.forward = mortal


if __name__ == "__main__":
    if "DIE_IN_STEP" in os.environ and os.environ["RANK"] == "1":
        die_in_step(int(os.environ["DIE_IN_STEP"]))
    train(Path(sys.argv[1]), int(sys.argv[2]), [Path(source) for source in sys.argv[3:]])
