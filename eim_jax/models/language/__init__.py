"""Language models with LM_e, LM_block and head callable by themselves."""
