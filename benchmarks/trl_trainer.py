"""TRL's DPOTrainer fed with our tokens, for bench.py dpo and the test of one batch's loss."""

import statistics
import threading

import numpy as np
import torch

from data import update_count, update_members


class TRLLoop:
    """TRL's own training loop, in a thread of its own that waits between two updates."""

    def __init__(self, config, documents):
        """config: the `DPOConfig` that our loop runs with. The reference is computed here."""
        import transformers

        n, batch_size = len(documents), config.batch_size
        _, total = update_count(n, batch_size, config.epochs)
        order = [update_members(n, batch_size, config.seed, k)[1] for k in range(total)]
        pairs, folder = np.concatenate(order).tolist(), f"{config.out}-trl"
        self.trainer = trl_trainer(config, documents, pairs, output_dir=folder)
        self.batches = batch_size // 4  # of one update
        self.go_on, self.done, self.error = threading.Semaphore(0), threading.Semaphore(0), None

        def wait(*_, **__):
            self.done.release()
            self.go_on.acquire()

        callback = transformers.TrainerCallback()
        callback.on_train_begin = callback.on_step_end = wait
        self.trainer.add_callback(callback)
        threading.Thread(target=self.train, daemon=True).start()
        self.wait()

    def train(self):
        """What the thread does."""
        try:
            self.trainer.train()
        except BaseException as error:
            self.error = error
            self.done.release()

    def wait(self):
        """Wait until the thread waits, or raise what it raised."""
        self.done.acquire()
        if self.error:
            raise self.error

    def update(self, pairs, lr):
        """TRL's next update, which is the one of these pairs: the loss."""
        self.go_on.release()
        self.wait()
        return statistics.fmean(b["loss"] for b in self.trainer.batches[-self.batches :])


def trl_trainer(config, documents, order, **settings):
    """TRL's DPOTrainer on the pairs of `order`, one after another, with our tokens and our AdamW.

    config: a `DPOConfig`. The loss and TRL's metrics of each batch are in `batches`, a list.
    """
    import datasets
    import tokenizers
    import transformers
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # it holds token ids, which TRL would make here

        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments, **more):
            loss = super().compute_loss(*arguments, **more)
            metrics = {name: values[-1] for name, values in self._metrics["train"].items()}
            self.batches.append({"loss": loss.item(), **metrics})
            return loss

    rows = []
    for pair in order:
        (chosen, trained), (rejected, _) = documents[pair]
        n = int(np.argmax(trained))  # the answer is all that follows the prompt
        ids = {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}
        rows.append({f"{name}_ids": np.asarray(part).tolist() for name, part in ids.items()})
    defaults = {
        "output_dir": config.out,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": config.batch_size // 4,
        "num_train_epochs": 1,
        "precompute_ref_log_probs": True,
        "max_length": config.max_seq_len,
        "beta": config.beta,
        "learning_rate": config.lr,
        "lr_scheduler_type": "linear",
        "weight_decay": config.weight_decay,
        "adam_beta1": config.beta1,
        "adam_beta2": config.beta2,
        "max_grad_norm": config.clip,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    names = {f"{name}_token": "<unk>" for name in ("pad", "eos", "unk")}
    trainer = Trainer(
        model=transformers.LlamaForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        args=trl.DPOConfig(**(defaults | settings)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names),
    )
    trainer.batches = []
    return trainer
