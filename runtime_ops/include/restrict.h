// SPLITQ_RESTRICT: a pointer to what no other pointer of the function reaches.
#pragma once

#if defined(_MSC_VER)
#define SPLITQ_RESTRICT __restrict
#else
#define SPLITQ_RESTRICT __restrict__
#endif
