"""The mark of objects that only the package makes."""

# Raises TypeError unless `mark` is the package's own. IN what: the class, and who makes its objects
cdef int check_maker(mark, str what) except -1
# The mark: first argument of __new__ of such a class
cdef object maker()
