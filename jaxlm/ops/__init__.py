"""Operations that are done differently on a CPU and on a GPU, each behind one function."""
