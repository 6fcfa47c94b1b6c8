// detect MODEL.pt2 PICTURE.ppm [SCORE]: prints the objects that an exported detector finds, one a line: label, score and
// the box x1 y1 x2 y2 in pixels. A binary PPM holds bytes red, green, blue; `convert a.jpg a.ppm` makes one.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdlib>
#include <fstream>
#include <iostream>

torch::Tensor read_ppm(const char* path) {  // uint8 [1, 3, H, W]
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int64_t width = 0, height = 0, most = 0;
  file >> kind >> width >> height >> most;
  file.get();
  TORCH_CHECK(file && kind == "P6" && most == 255, path, ": expected a binary PPM of 8 bits");
  torch::Tensor image = torch::empty({height, width, 3}, torch::kUInt8);
  file.read(reinterpret_cast<char*>(image.data_ptr<uint8_t>()), image.numel());
  TORCH_CHECK(file, path, ": is cut off");
  return image.permute({2, 0, 1}).unsqueeze(0).contiguous();
}

int main(int argc, char** argv) try {
  TORCH_CHECK(argc >= 3, "usage: detect MODEL.pt2 PICTURE.ppm [SCORE]");
  const double least = argc > 3 ? std::atof(argv[3]) : 0.5;
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const auto found = model.run({read_ppm(argv[2])});  // boxes [1, D, 4], scores [1, D], labels [1, D], counts [1]
  for (int64_t i = 0; i < found[3][0].item<int64_t>(); ++i) {
    const double score = found[1][0][i].item<double>();
    if (score < least) continue;
    std::cout << found[2][0][i].item<int64_t>() << ' ' << score;
    for (int k = 0; k < 4; ++k) std::cout << ' ' << found[0][0][i][k].item<double>();
    std::cout << '\n';
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
