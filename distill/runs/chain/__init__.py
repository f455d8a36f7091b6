"""Chains: stages that train a student, precompute it into a store, and train the next one from it.

Each stage is the recipe of an existing command, and they run one after another (docs/decisions/chain.md).

file      chain files and the references between stages
plan      a chain file resolved and checked before anything runs
planned   stores that stages will write, and the checks of stages that read them
record    recipe, inputs and result of each stage, in the chain's folder
run       the stages that are not finished, in order
stages    execution of a stage of each kind
"""
