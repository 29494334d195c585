// Reads: row-major float matrices of any size. Tile: 4 rows x 16 columns, smaller at the edges.
// Features: AVX2, FMA.
// Exactness: float; whole numbers that stay below 2^24 are exact.
// Idea: quantize/matrix_product.h.
#include "quantize/avx2.h"
#include "quantize/avx2_vectors.h"

namespace splitq {

void MultiplyAvx2(const MatrixProduct& product) { Multiply<Eight, Four, One>(product); }

}  // namespace splitq
