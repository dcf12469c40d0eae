"""`hira convert`: adapters from the paper's repository, to LoRA, and for PEFT's own HiRA."""
