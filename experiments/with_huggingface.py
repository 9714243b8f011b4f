import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from adaptive_opt.integrations.huggingface import AdaptiveFactory, LogReadings

size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
model = BertForSequenceClassification(BertConfig(vocab_size=32, **size))
rows = [{"input_ids": torch.randint(0, 32, (8,)), "labels": n % 2} for n in range(80)]
args = TrainingArguments("runs/trainer", max_steps=20, per_device_train_batch_size=4, report_to="none", use_cpu=True)
trainer = Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=(AdaptiveFactory, {"lr": 1e-3}))
trainer.add_callback(LogReadings(trainer))
trainer.train()
print([line for line in trainer.state.log_history if any("adaptive/sigma_rms" in key for key in line)])
