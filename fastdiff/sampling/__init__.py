"""Which steps are taken: parameterisations, row-wise samplers, guidance."""
