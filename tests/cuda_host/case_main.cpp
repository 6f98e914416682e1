// A program around run_case(name), which a .cu file of tests defines: 0 when the case is right.
#include <cstdio>

extern "C" int run_case(const char* name);

int main(int count, char** arguments) {
  if (count != 2) return std::fprintf(stderr, "want the name of a case\n"), 2;
  return run_case(arguments[1]);
}
