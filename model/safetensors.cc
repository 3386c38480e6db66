#include "model/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/file.h"
#include "model/json.h"
#include "model/safetensors_header.h"
#include "model/strings.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using TensorMap = std::map<std::string, TensorInfo, std::less<>>;

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr int64_t kMaxIndexBytes = 64 << 20;
constexpr uint64_t kSampleBytes = 64;

absl::Status SystemError(const std::string& path, const char* what, int error) {
  return absl::Status(
      error == ENOENT ? absl::StatusCode::kNotFound : absl::StatusCode::kFailedPrecondition,
      absl::StrCat(path, ": ", what, ": ", std::strerror(error)));
}

// One file, open and mapped for as long as this lives.
class MappedFile {
 public:
  static absl::StatusOr<MappedFile> Open(const std::string& path) {
    MappedFile file;
    file.path_ = path;
    // O_NONBLOCK: a FIFO in the place of a file is refused instead of waited for.
    file.fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file.fd_ < 0) return SystemError(path, "cannot open", errno);
    if (::fstat(file.fd_, &file.stat_) != 0) return SystemError(path, "cannot stat", errno);
    if (!S_ISREG(file.stat_.st_mode)) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
    }
    return file;
  }

  MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(fd_, other.fd_);
    std::swap(data_, other.data_);
    std::swap(stat_, other.stat_);
    return *this;
  }
  ~MappedFile() {
    if (data_ != nullptr) ::munmap(data_, size());
    if (fd_ >= 0) ::close(fd_);
  }

  size_t size() const { return static_cast<size_t>(stat_.st_size); }
  const std::string& path() const { return path_; }
  std::byte* data() const { return static_cast<std::byte*>(data_); }

  // Not through the mapping: reading a file that shrinks meanwhile is an error
  // here and a SIGBUS there.
  absl::StatusOr<std::string> Read(uint64_t offset, size_t count) const {
    std::string bytes(count, '\0');
    size_t done = 0;
    while (done < count) {
      const ssize_t got =
          ::pread(fd_, bytes.data() + done, count - done, static_cast<off_t>(offset + done));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return SystemError(path_, "cannot read", errno);
      if (got == 0) {
        return absl::InvalidArgumentError(absl::StrCat(path_, ": file shrank while it was read"));
      }
      done += static_cast<size_t>(got);
    }
    return bytes;
  }

  absl::Status Map() {
    if (size() == 0) return absl::OkStatus();
    void* data = ::mmap(nullptr, size(), PROT_READ, MAP_PRIVATE, fd_, 0);
    if (data == MAP_FAILED) return SystemError(path_, "cannot map", errno);
    data_ = data;
    return absl::OkStatus();
  }

  absl::Status CheckUnchanged() const {
    struct stat now;
    if (::fstat(fd_, &now) != 0) return SystemError(path_, "cannot stat", errno);
    if (now.st_size != stat_.st_size || now.st_mtim.tv_sec != stat_.st_mtim.tv_sec ||
        now.st_mtim.tv_nsec != stat_.st_mtim.tv_nsec) {
      return absl::FailedPreconditionError(absl::StrCat(path_, ": changed since it was opened (",
                                                        stat_.st_size, " bytes then, ", now.st_size,
                                                        " now)"));
    }
    return absl::OkStatus();
  }

 private:
  MappedFile() = default;

  std::string path_;
  int fd_ = -1;
  void* data_ = nullptr;
  struct stat stat_ = {};
};

// What an index says: tensor name -> file name.
using WeightMap = std::map<std::string, std::string>;

bool IsPlainName(const std::string& name) {
  return name.size() <= 255 && name.ends_with(".safetensors") && name.front() != '.' &&
         std::none_of(name.begin(), name.end(), [](unsigned char c) {
           return c == '/' || c == '\\' || c < 0x20 || c == 0x7f;
         });
}

absl::StatusOr<WeightMap> ParseIndex(std::string_view text, const std::string& path) {
  absl::StatusOr<json> index = ParseJsonObject(text, path);
  if (!index.ok()) return index.status();
  const auto bad = [&](const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", what));
  };
  const auto map = index->find("weight_map");
  if (map == index->end() || !map->is_object() || map->empty()) {
    return bad("field weight_map is missing, empty or not an object");
  }
  WeightMap weight_map;
  for (const auto& [tensor, file] : map->items()) {
    if (!file.is_string() || !IsPlainName(file.get_ref<const std::string&>())) {
      return bad(absl::StrCat("weight_map names ", PrintableJson(file), " for tensor ",
                              Printable(tensor),
                              "; expected the plain name of a .safetensors file beside it"));
    }
    weight_map.emplace(tensor, file.get<std::string>());
  }
  return weight_map;
}

absl::StatusOr<std::set<std::string>> ListSafetensors(const std::string& dir) {
  std::set<std::string> names;
  std::error_code error;
  fs::directory_iterator it(dir, error);
  for (; !error && it != fs::directory_iterator(); it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (name.ends_with(".safetensors")) names.insert(name);
  }
  if (error) return absl::NotFoundError(absl::StrCat(dir, ": ", error.message()));
  if (names.empty()) {
    return absl::NotFoundError(
        absl::StrCat(dir, ": no ", kSingleFile, ", ", kIndexFile, " or other .safetensors file"));
  }
  return names;
}

bool Exists(const fs::path& path) {
  std::error_code error;
  return fs::exists(path, error);
}

}  // namespace

struct Checkpoint::Impl {
  std::vector<MappedFile> mapped;
  std::vector<std::string> files;
  TensorMap tensors;

  absl::Status AddFile(const std::string& path);
  absl::Status CheckIndex(const WeightMap& weight_map, const std::string& index_path) const;
  void Advise(const TensorInfo& tensor, uint64_t begin, uint64_t end, int advice,
              bool whole_pages_only) const;
};

absl::Status Checkpoint::Impl::AddFile(const std::string& path) {
  absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  const absl::StatusOr<std::string> first =
      file->Read(0, std::min<size_t>(file->size(), kSafetensorsLengthBytes));
  if (!first.ok()) return first.status();
  const absl::StatusOr<uint64_t> length = ParseSafetensorsLength(*first, file->size(), path);
  if (!length.ok()) return length.status();
  const absl::StatusOr<std::string> header = file->Read(kSafetensorsLengthBytes, *length);
  if (!header.ok()) return header.status();
  auto entries = ParseSafetensorsHeader(*header, file->size(), path);
  if (!entries.ok()) return entries.status();
  for (auto& [name, info] : *entries) {
    info.file = mapped.size();
    const auto [it, inserted] = tensors.try_emplace(name, std::move(info));
    if (!inserted) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor ", Printable(name), " is also in ", files[it->second.file]));
    }
  }
  if (absl::Status status = file->Map(); !status.ok()) return status;
  if (absl::Status status = file->CheckUnchanged(); !status.ok()) return status;
  files.push_back(path);
  mapped.push_back(*std::move(file));
  return absl::OkStatus();
}

absl::Status Checkpoint::Impl::CheckIndex(const WeightMap& weight_map,
                                          const std::string& index_path) const {
  for (const auto& [name, file] : weight_map) {
    const auto it = tensors.find(name);
    if (it == tensors.end() || fs::path(files[it->second.file]).filename() != file) {
      return absl::InvalidArgumentError(absl::StrCat(index_path, ": tensor ", Printable(name),
                                                     " is not in ", file, ", where it should be"));
    }
  }
  return absl::OkStatus();
}

void Checkpoint::Impl::Advise(const TensorInfo& tensor, uint64_t begin, uint64_t end, int advice,
                              bool whole_pages_only) const {
  const MappedFile& file = mapped[tensor.file];
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  begin = tensor.offset + std::min(begin, tensor.num_bytes);
  end = tensor.offset + std::min(end, tensor.num_bytes);
  const uint64_t first = whole_pages_only ? (begin + page - 1) / page * page : begin / page * page;
  const uint64_t last = whole_pages_only ? end / page * page : end;
  // Advice that is not taken costs speed, nothing else.
  if (first < last) (void)::madvise(file.data() + first, last - first, advice);
}

Checkpoint::Checkpoint(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Checkpoint::~Checkpoint() = default;

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& model_dir) {
  const fs::path dir(model_dir);
  const std::string index_path = (dir / kIndexFile).string();
  std::set<std::string> names;
  WeightMap weight_map;
  if (Exists(dir / kSingleFile)) {
    names = {kSingleFile};
  } else if (Exists(index_path)) {
    const absl::StatusOr<std::string> text = ReadSmallFile(index_path, kMaxIndexBytes);
    if (!text.ok()) return text.status();
    absl::StatusOr<WeightMap> parsed = ParseIndex(*text, index_path);
    if (!parsed.ok()) return parsed.status();
    weight_map = *std::move(parsed);
    for (const auto& [tensor, file] : weight_map) names.insert(file);
  } else {
    absl::StatusOr<std::set<std::string>> listed = ListSafetensors(model_dir);
    if (!listed.ok()) return listed.status();
    names = *std::move(listed);
  }

  auto impl = std::make_unique<Impl>();
  for (const std::string& name : names) {
    absl::Status status = impl->AddFile((dir / name).string());
    if (absl::IsNotFound(status) && !weight_map.empty()) {
      return absl::FailedPreconditionError(
          absl::StrCat(index_path, ": names ", name, ", which is not in the directory"));
    }
    if (!status.ok()) return status;
  }
  if (absl::Status status = impl->CheckIndex(weight_map, index_path); !status.ok()) return status;
  return std::unique_ptr<Checkpoint>(new Checkpoint(std::move(impl)));
}

const TensorInfo* Checkpoint::Find(std::string_view name) const {
  const auto it = impl_->tensors.find(name);
  return it == impl_->tensors.end() ? nullptr : &it->second;
}

absl::Span<const std::byte> Checkpoint::Bytes(const TensorInfo& tensor) const {
  return {impl_->mapped[tensor.file].data() + tensor.offset, static_cast<size_t>(tensor.num_bytes)};
}

absl::Status Checkpoint::CheckUnchanged() const {
  for (const MappedFile& file : impl_->mapped) {
    if (absl::Status status = file.CheckUnchanged(); !status.ok()) return status;
  }
  return absl::OkStatus();
}

void Checkpoint::WillNeed(const TensorInfo& tensor, uint64_t begin, uint64_t end) const {
  impl_->Advise(tensor, begin, end, MADV_WILLNEED, false);
}

void Checkpoint::DoneWith(const TensorInfo& tensor, uint64_t begin, uint64_t end) const {
  impl_->Advise(tensor, begin, end, MADV_DONTNEED, true);
}

const std::vector<std::string>& Checkpoint::files() const { return impl_->files; }
const TensorMap& Checkpoint::tensors() const { return impl_->tensors; }

absl::StatusOr<uint64_t> Checkpoint::Digest() const {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a, 64 bits
  const auto mix = [&](std::string_view bytes) {
    for (const char c : bytes) {
      hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
    }
    hash = (hash ^ 0xff) * 0x100000001b3;  // ends a field; no byte of UTF-8
  };
  for (const auto& [name, info] : impl_->tensors) {
    mix(name);
    mix(info.dtype_name);
    for (const int64_t size : info.shape) mix(std::to_string(size));
    // From its middle: a new revision of the weights has other ones there.
    const uint64_t count = std::min(info.num_bytes, kSampleBytes);
    const absl::StatusOr<std::string> sample =
        impl_->mapped[info.file].Read(info.offset + (info.num_bytes - count) / 2, count);
    if (!sample.ok()) return sample.status();
    mix(*sample);
  }
  return hash;
}

}  // namespace lockstep
