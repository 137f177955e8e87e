"""The mark of objects that only the package makes: their classes have nothing to walk, or nobody to own it, without a maker."""

cdef object MARK = object()


cdef int check_maker(mark, str what) except -1:
    if mark is not MARK:
        raise TypeError(f"{what}, and not otherwise")
    return 0


cdef object maker():
    return MARK
