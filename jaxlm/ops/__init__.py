"""Operations that a CPU and a GPU compute in different ways, each behind one function.

`jax.lax.platform_dependent` chooses when a program is lowered: one for GPUs can be lowered where there is only a CPU.
"""
