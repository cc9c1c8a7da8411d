// Runs every kernel once on memory of exactly the size it may touch, for a sanitizer to watch.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "t16.h"

int main() {
    for (int tier = 0; t16_tier(tier); ++tier) {
        if (!t16_present(tier)) continue;
        for (int bits : {2, 3, 4, 8})
            for (int columns : {32, 128, 384})
                for (int step : {32, 128})
                    for (int rows : {1, 16, 37})
                        for (int inputs : {1, 3, 9})
                            for (int digits : {1, 2})
                                for (int zeros : {0, 1}) {
                                    if (columns % step) continue;
                                    const int blocks = (rows + 15) / 16, steps = columns / step;
                                    std::vector<uint8_t> codes(blocks * columns * bits * 2, 0xff), points(blocks * 16 * steps, 1);
                                    std::vector<uint16_t> scales(blocks * 16 * steps, 0x3f80);
                                    std::vector<float> x((columns - 3) * inputs, -1.5f), y(inputs * rows, 7);
                                    const t16_matrix matrix = {codes.data(), scales.data(), zeros ? points.data() : nullptr, rows, columns, step, step, bits, 1};
                                    t16_linear(tier, &matrix, x.data(), inputs, columns - 3, digits, y.data(), 2);
                                    for (float value : y)
                                        if (value == 7) std::abort();
                                }
    }
    std::vector<uint64_t> data(1024, 1);
    t16_large_pages(data.data(), 8192);
    if (t16_read(data.data(), 8192, 2) != 1024) std::abort();
    std::puts("clean");
}
