"""What pipeline and trainer share: configs, records, arithmetic, the wire format; no torch, no ray."""
