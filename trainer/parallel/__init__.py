"""Several processes: DDP, FSDP2, ZeRO-3."""
