"""`hira finetune`: TRL's and transformers' trainers, with HiRA adapters, behind flags and YAML in TRL's names."""
