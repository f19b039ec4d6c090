"""Several devices for one picture: who computes which rows, frames, branches or blocks, and what they exchange.

`communicator` is the seam: `distributed` speaks torch.distributed, `simulator` runs the same code for virtual ranks in
one process and `clock` says how long their exchange would take. `strips` and `layers` hold the arithmetic, `exchange`
what may be one step old. The accelerations are `patch`, `branches`, `decoder`, `clip`, `stages`, `context`; the
add-ons are `lora` and `controlnet`. `inventory`, `cost`, `probe` and `published` predict.
"""
