"""Operations that a CPU and a GPU compute in different ways, each behind one function; `platform` has the choice."""
