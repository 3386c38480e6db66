#include "model/model_config.h"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/config_keys.h"
#include "model/config_reader.h"
#include "model/families.h"
#include "model/file.h"
#include "model/json.h"
#include "model/safetensors.h"
#include "model/strings.h"

namespace lockstep {
namespace {

using nlohmann::json;

const Family* FindFamily(std::string_view architecture) {
  for (const Family& family : Families()) {
    if (family.architecture == architecture) return &family;
  }
  return nullptr;
}

// By architectures, or, where a config names none, by model_type.
const Family* ReadFamilyName(ConfigReader& reader) {
  const std::vector<std::string> architectures = reader.Strings("architectures");
  const std::string model_type = reader.String("model_type", "");
  if (!reader.ok()) return nullptr;
  if (architectures.size() > 1) {
    reader.FailInvalid("architectures", "names several architectures; expected one");
    return nullptr;
  }
  if (architectures.empty()) {
    for (const Family& family : Families()) {
      if (family.model_type == model_type) return &family;
    }
    reader.FailUnsupported("model_type", absl::StrCat("is \"", Printable(model_type),
                                                      "\" and architectures names none; "
                                                      "supported architectures: ",
                                                      SupportedArchitectures()));
    return nullptr;
  }
  const Family* family = FindFamily(architectures.front());
  if (family == nullptr) {
    reader.FailUnsupported("architectures",
                           absl::StrCat("is ", Printable(architectures.front()),
                                        "; supported: ", SupportedArchitectures()));
    return nullptr;
  }
  if (!model_type.empty() && model_type != family->model_type) {
    reader.FailUnsupported("model_type",
                           absl::StrCat("is \"", Printable(model_type), "\" with architecture ",
                                        AbslView(family->architecture), "; expected \"",
                                        AbslView(family->model_type), "\""));
    return nullptr;
  }
  return family;
}

// torch_dtype, or dtype as transformers 5 spells it; float32 where neither is.
DType ReadDType(ConfigReader& reader) {
  const std::string old_name = reader.String("torch_dtype", "float32");
  std::string name = reader.String("dtype", old_name);
  if (reader.HasValue("torch_dtype") && name != old_name) {
    reader.FailInvalid("dtype", "disagrees with torch_dtype");
  }
  if (name.starts_with("torch.")) name.erase(0, 6);
  const absl::StatusOr<DType> dtype = ParseDType(name);
  if (!dtype.ok() || *dtype == DType::kFloat8E4M3) {
    reader.FailUnsupported(
        reader.HasValue("dtype") ? "dtype" : "torch_dtype",
        absl::StrCat("is \"", Printable(name), "\"; supported: float32, float16, bfloat16"));
    return DType::kFloat32;
  }
  return *dtype;
}

// The dtype that holds most of a checkpoint's bytes; nothing when there is no
// checkpoint to look at, which is for its loader to complain about.
std::optional<DType> DTypeOfTensors(const std::string& model_dir) {
  const absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open(model_dir);
  if (!checkpoint.ok()) return std::nullopt;
  std::map<DType, uint64_t> bytes;
  for (const auto& [name, info] : (*checkpoint)->tensors()) {
    if (info.loadable && info.dtype != DType::kFloat8E4M3) bytes[info.dtype] += info.num_bytes;
  }
  std::optional<DType> most;
  for (const auto& [dtype, count] : bytes) {
    if (!most.has_value() || count > bytes[*most]) most = dtype;
  }
  return most;
}

// Every weight matrix counts as one of fp8 bytes, whatever the file exempts:
// that is how such a checkpoint is served (--quantization fp8).
std::string ReadQuantization(ConfigReader& reader) {
  const json* object = reader.Object("quantization_config");
  if (object == nullptr || object->empty()) return "";
  ConfigReader quantization(*object, reader.where(), "quantization_config.");
  const std::string method = quantization.String("quant_method", "");
  const std::string format = quantization.String("format", "");
  if (quantization.HasValue("weight_block_size")) {
    reader.FailUnsupported("quantization_config.weight_block_size",
                           "is set; supported: one scale a tensor or one a row");
    return "";
  }
  reader.Fail(quantization.status());
  if (method == "fp8" || method == "fbgemm_fp8") return "fp8";
  if (method == "compressed-tensors" && format == "float-quantized") return "fp8";
  reader.FailUnsupported(
      "quantization_config",
      absl::StrCat("has quant_method \"", Printable(method), "\"",
                   format.empty() ? "" : absl::StrCat(" and format \"", Printable(format), "\""),
                   "; recognised: fp8, fbgemm_fp8, compressed-tensors with format "
                   "float-quantized"));
  return "";
}

bool IsDirectory(const std::string& path) {
  struct stat st;
  return ::stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode);
}

}  // namespace

int64_t DTypeBytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat8E4M3:
      return 1;
  }
  return 0;
}

std::string_view DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat8E4M3:
      return "float8_e4m3fn";
  }
  return "";
}

absl::StatusOr<DType> ParseDType(std::string_view name) {
  for (const DType dtype :
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3}) {
    if (name == DTypeName(dtype)) return dtype;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "unknown dtype \"", Printable(name), "\"; known: float32, float16, bfloat16, float8_e4m3fn"));
}

absl::StatusOr<DType> ParseKvCacheDType(std::string_view name, DType serving) {
  if (name == "auto") return serving;
  if (name == "fp8" || name == "fp8_e4m3") return DType::kFloat8E4M3;
  return absl::InvalidArgumentError(
      absl::StrCat("\"", Printable(name), "\" is not known; auto, fp8 or fp8_e4m3"));
}

absl::Status CheckKvDType(DType kv_dtype, DType serving, BackendKind backend) {
  if (kv_dtype == serving) return absl::OkStatus();
  if (kv_dtype != DType::kFloat8E4M3) {
    return absl::InvalidArgumentError(
        absl::StrCat("keys and values of ", AbslView(DTypeName(kv_dtype)), " beside ",
                     AbslView(DTypeName(serving)), "; expected the same, or float8_e4m3fn"));
  }
  if (backend == BackendKind::kCpu) {
    return absl::InvalidArgumentError(
        "the cpu backend keeps keys and values in the serving dtype alone; use auto, or "
        "--backend cuda");
  }
  if (serving == DType::kFloat32) {
    return absl::InvalidArgumentError(
        "no keys and values of 8 bits beside float32; use auto, or --dtype bfloat16 or float16");
  }
  return absl::OkStatus();
}

std::string SupportedArchitectures() {
  std::string names;
  for (const Family& family : Families()) {
    absl::StrAppend(&names, names.empty() ? "" : ", ", AbslView(family.architecture));
  }
  return names;
}

std::string_view BackendName(BackendKind backend) {
  return backend == BackendKind::kCpu ? "cpu" : "cuda";
}

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view text, std::string_view where) {
  absl::StatusOr<json> object = ParseJsonObject(text, where);
  if (!object.ok()) return object.status();

  ConfigReader reader(*object, std::string(where), "");
  ModelConfig config;
  const Family* family = ReadFamilyName(reader);
  if (family == nullptr) return reader.status();
  config.architecture = family->architecture;
  config.model_type = family->model_type;
  config.dtype_given = reader.HasValue("dtype") || reader.HasValue("torch_dtype");
  config.dtype = ReadDType(reader);
  config.quantization = ReadQuantization(reader);
  config.eos_token_ids = reader.TokenIds("eos_token_id");
  if (const std::vector<uint32_t> bos = reader.TokenIds("bos_token_id"); !bos.empty()) {
    config.bos_token_id = bos.front();
  }
  // Read by newer reference implementations of every family.
  reader.RequireBool("is_causal", true);
  family->read(reader, config);
  reader.RefuseUnread(&IsHarmlessConfigKey);
  if (!reader.ok()) return reader.status();
  return config;
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& model_dir) {
  const std::string path = IsDirectory(model_dir) || model_dir.ends_with('/')
                               ? (std::filesystem::path(model_dir) / "config.json").string()
                               : model_dir;
  const absl::StatusOr<std::string> text = ReadSmallFile(path, kMaxConfigBytes);
  if (!text.ok()) return text.status();
  absl::StatusOr<ModelConfig> config = ParseModelConfig(*text, path);
  if (config.ok() && !config->dtype_given) {
    config->dtype = DTypeOfTensors(model_dir).value_or(config->dtype);
  }
  return config;
}

absl::Status CheckServable(const ModelConfig& config, BackendKind backend) {
  if (backend == BackendKind::kCpu && !config.quantization.empty()) {
    return absl::UnimplementedError(
        absl::StrCat("config.json: field quantization_config is ", config.quantization,
                     "; the cpu backend serves float32, float16 and bfloat16 checkpoints"));
  }
  return absl::OkStatus();
}

}  // namespace lockstep
