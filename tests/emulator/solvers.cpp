// A plain Cholesky in the place of cuSolverDx, with its contract: by all threads of a block, a barrier inside
// and none at the ends. Matrices are stored by columns; of A the lower triangle is read.

#include "cuda.h"

// Reads of what the caller must have written before a barrier, by any of the threads.
static double read_all(const double* values, int number) {
    double sum = 0;
    for (int i = threadIdx.x; i < number; i += THREADS) sum += values[i];
    return sum;
}

static double read_lower(const double* A) {
    double sum = 0;
    for (int i = threadIdx.x; i < SIZE * SIZE; i += THREADS)
        if (i % SIZE >= i / SIZE) sum += A[i];
    return sum;
}

extern "C" void potrf(double* A, int* info) {
    volatile double read = read_lower(A);
    (void)read;
    __syncthreads();
    if (threadIdx.x != 0) return;
    *info = 0;
    for (int k = 0; k < SIZE; ++k) {
        double pivot = A[k + k * SIZE];
        if (!(pivot > 0)) {
            *info = k + 1;
            return;
        }
        pivot = std::sqrt(pivot);
        A[k + k * SIZE] = pivot;
        for (int i = k + 1; i < SIZE; ++i) A[i + k * SIZE] /= pivot;
        for (int j = k + 1; j < SIZE; ++j)
            for (int i = j; i < SIZE; ++i) A[i + j * SIZE] -= A[i + k * SIZE] * A[j + k * SIZE];
    }
}

extern "C" void potrs(double* A, double* B) {
    volatile double read = read_lower(A) + read_all(B, SIZE * NUM_RIGHT_HAND_SIDES);
    (void)read;
    __syncthreads();
    if (threadIdx.x >= NUM_RIGHT_HAND_SIDES) return;
    double* b = B + threadIdx.x * SIZE;
    for (int i = 0; i < SIZE; ++i) {
        for (int j = 0; j < i; ++j) b[i] -= A[i + j * SIZE] * b[j];
        b[i] /= A[i + i * SIZE];
    }
    for (int i = SIZE - 1; i >= 0; --i) {
        for (int j = i + 1; j < SIZE; ++j) b[i] -= A[j + i * SIZE] * b[j];
        b[i] /= A[i + i * SIZE];
    }
}
