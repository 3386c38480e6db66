// Scales that a product of e4m3 left to the kernel under test.
#ifndef LOCKSTEP_TESTS_KERNELS_PRODUCT_SCALES_H_
#define LOCKSTEP_TESTS_KERNELS_PRODUCT_SCALES_H_

#include <cstdint>
#include <vector>

#include "kernels/types.h"
#include "tests/kernels/device_rows.h"

namespace lockstep::kernels {

// Between 0.25 and 1.25 each.
class LeftScales {
 public:
  LeftScales(int rows, int columns, uint32_t seed)
      : rows_(Positive(rows, seed)),
        columns_(Positive(columns, seed + 1)),
        device_rows_(rows_),
        device_columns_(columns_) {}

  // As kernels form it.
  float Of(int row, int column) const { return columns_[column] * rows_[row]; }
  const std::vector<float>& rows() const { return rows_; }
  ProductScales get() const { return {device_rows_.get(), device_columns_.get()}; }

 private:
  static std::vector<float> Positive(int count, uint32_t seed) {
    std::vector<float> values = RandomValues<float>(count, seed, 1.0f);
    for (float& v : values) v = std::abs(v) + 0.25f;
    return values;
  }

  const std::vector<float> rows_, columns_;
  const DeviceRows<float> device_rows_, device_columns_;
};

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_TESTS_KERNELS_PRODUCT_SCALES_H_
