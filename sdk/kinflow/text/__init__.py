"""Language models across device, edge and cloud: the device drafts, the tiers above verify."""
