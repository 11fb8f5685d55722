"""TRL's DPOTrainer fed with our tokens, for bench.py dpo and the test of one batch's loss."""

import numpy as np
import torch


def trl_trainer(config, folder, documents, order, **settings):
    """TRL's DPOTrainer on the pairs of `order`, one after another, with our tokens and our AdamW.

    Its metrics of each batch, the loss among them, are in `batches`.
    """
    import datasets
    import tokenizers
    import transformers
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # of token ids, which it would make here

        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments, **more):
            loss = super().compute_loss(*arguments, **more)
            metrics = {name: values[-1] for name, values in self._metrics["train"].items()}
            self.batches.append({"loss": loss.item(), **metrics})
            return loss

    rows = []
    for pair in order:
        (chosen, marks), (rejected, _) = documents[2 * pair], documents[2 * pair + 1]
        n = int(np.argmax(marks))  # the answer is all that is left of a document
        ids = {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}
        rows.append({f"{name}_ids": np.asarray(part).tolist() for name, part in ids.items()})
    defaults = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": config.batch_size // 4,
        "num_train_epochs": 1,
        "precompute_ref_log_probs": True,
        "max_length": config.max_seq_len,
        "beta": config.beta,
        "learning_rate": config.lr,
        "lr_scheduler_type": "constant",
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
        model=transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=trl.DPOConfig(**(defaults | settings)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names),
    )
    trainer.batches = []
    return trainer
