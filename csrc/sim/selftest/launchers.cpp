// launchers [once]: runs every launcher of every op under several schedules. The results of one op must be the same
// bits under all of them, whatever its outputs held before. Exit status 1 when they are not. With "once" only the first
// schedule runs, which mixes threads and blocks, and one of the 16-bit types: for race detection, whose time grows with
// the threads that are resident, and for coverage.
#include "launchers.h"

#include <cstdio>
#include <cstring>

#include "../launch.h"

namespace launchers {
namespace {

std::vector<const Op*>& ops() {
  static std::vector<const Op*> all;
  return all;
}

struct Schedule {
  int order, resident_blocks, fill;
  const char* name;
};
constexpr Schedule kFirst = {2, 2, 0x55, "shuffled, two blocks at a time"},
                   kOthers[] = {
                       {1, 3, 0xff, "reverse, three blocks at a time"},
                       {0, 1, 0x00, "forward"},
                   };

std::vector<char> run(const Op& op, const Schedule& schedule, bool once) {
  pynn_sim_configure(schedule.order, 7, schedule.resident_blocks);
  Run pass(schedule.fill, once);
  op.launch(pass);
  return pass.results();
}

}  // namespace

Op::Op(const char* name, void (*launch)(Run&)) : name(name), launch(launch) { ops().push_back(this); }

int run_all(bool once) {
  bool all_same = !ops().empty();
  for (const Op* op : ops()) {
    bool same = true;
    const uint64_t before = pynn_sim_launches();
    const std::vector<char> expected = run(*op, kFirst, once);
    for (const Schedule& schedule : kOthers) {
      if (once) break;
      const std::vector<char> got = run(*op, schedule, once);
      if (got == expected) continue;
      size_t at = 0;
      while (got[at] == expected[at]) ++at;
      std::printf("%s: schedule \"%s\" gives other results than \"%s\", first at byte %zu of all outputs\n", op->name,
                  schedule.name, kFirst.name, at);
      same = false;
    }
    std::printf("%s: %llu launches, %zu bytes of results, %s\n", op->name,
                static_cast<unsigned long long>(pynn_sim_launches() - before), expected.size(),
                once   ? "one schedule"
                : same ? "the same under every schedule"
                       : "FAILED");
    std::fflush(stdout);
    all_same = all_same && same;
  }
  return !all_same;
}

}  // namespace launchers

int main(int arguments, char** values) {
  return launchers::run_all(arguments > 1 && std::strcmp(values[1], "once") == 0);
}
