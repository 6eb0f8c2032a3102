"""A short run that says what it is about to do: for tests that kill it at such a moment."""

import os
import traceback
from multiprocessing.connection import Connection

from nfnet_keras.training import checkpoints, recorder, run, settings
from tests.training import few_layers

EPOCHS = 5


def train(out: str, said: Connection):
    """Runs, or resumes what is in `out`; says "step", "save", "evaluate", "table", and at last "done" or why not."""

    def saying(word, function):
        def and_does(*arguments, **options):
            said.send(word)
            return function(*arguments, **options)

        return and_does

    try:
        few_layers.use(few_layers.digits(6))
        for owner, method, word in (
            (recorder.Recorder, "on_train_batch_begin", "step"),
            (checkpoints.Checkpoints, "save", "save"),
            (recorder.Recorder, "finish_epoch", "evaluate"),
            (recorder.RunFolder, "write_table", "table"),
        ):
            setattr(owner, method, saying(word, getattr(owner, method)))
        config = settings(epochs=EPOCHS, seed=3, batch_size=32, checkpoint_minutes=0.03 / 60)
        run.train(config, out, resume=os.path.exists(out + "/config.json"), verbose=0)
        said.send("done")
    except BaseException:
        said.send("failed: " + traceback.format_exc())
        raise
