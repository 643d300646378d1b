"""The contract between the pipeline and the trainer: configs, records, arithmetic and the wire format; no torch, no ray."""
