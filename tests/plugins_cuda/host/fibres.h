// The threads of one CUDA block as fibres of one host thread.
//
// A fibre runs until it meets a collective (barrier, shuffle, matrix instruction); the last of its
// warp (or block) to arrive does the collective's work for all, in place, through the pointers the
// others left. Fibres of a warp must agree on the collective they are in, and a block whose fibres
// all wait, or of which some left while others wait, stops the process with a message: both are bugs
// that hang or corrupt on a GPU.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace vf_host {

[[noreturn]] inline void die(const char* why) {
  std::fprintf(stderr, "host build of the kernels: %s\n", why);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

enum class State : uint8_t { kReady, kInGroup, kInBlock, kDone };

struct Fibre {
  void* stack_pointer = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  std::vector<char> stack;
  int index = 0;
  State state = State::kDone;
  const void* operation = nullptr;  // the collective it waits in
  void* argument = nullptr;
  std::vector<Copy> copies;    // asynchronous copies not yet made, oldest first
  std::vector<size_t> groups;  // where each committed group of them ends
  bool waited = false;         // for the kernel in front
};

using Operation = void (*)(void* const* arguments);  // of all threads that meet

struct Block {
  static constexpr int kMaxThreads = 1024;
  std::vector<Fibre> fibres{kMaxThreads};
  Fibre main;
  int threads = 0, x = 0, y = 0, z = 0, grid_x = 0, grid_y = 0;
  int in_warp[kMaxThreads / 32] = {};
  int in_group[kMaxThreads / 128] = {};
  int in_block = 0, done = 0;
  int direction = 1;  // in which fibres take turns: races show as results that depend on it
  char* shared = nullptr;
  int shared_bytes = 0;
  void (*kernel)(const void*) = nullptr;
  const void* params = nullptr;
  bool left_early = false;  // a thread that had not waited for the kernel in front
};

// Memory of a kernel that is launched to overlap, as its threads find it: what the kernel in front
// writes as it was before, and from a thread's wait on as it became. So whoever reads too early reads
// what is not there yet, and what is written too early is lost.
struct Late {
  char* at;
  std::vector<char> before, after;
};

inline Block block;
inline std::vector<Late> late;
inline bool shown = false;  // which of both is in memory
inline Fibre* self = nullptr;

inline void show(bool after) {
  if (shown == after) return;
  shown = after;
  for (Late& part : late) {
    if (!after) std::memcpy(part.after.data(), part.at, part.after.size());
    std::memcpy(part.at, (after ? part.after : part.before).data(), part.before.size());
  }
}

#if defined(__x86_64__)
// Saves the callee-saved registers of one stack and restores another's: some 2 ns, which is why this
// is not swapcontext (it makes a system call for the signal mask).
extern "C" void vf_switch(void** from, void* to);
asm(R"(
.text
.type vf_switch, @function
vf_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size vf_switch, .-vf_switch
)");
inline void switch_to(Fibre* to) {
  Fibre* from = self;
  self = to;
  show(to->waited);
  vf_switch(&from->stack_pointer, to->stack_pointer);
}
#else
inline void switch_to(Fibre* to) {
  Fibre* from = self;
  self = to;
  show(to->waited);
  swapcontext(&from->context, &to->context);
}
#endif

// Gives the turn to the next ready fibre, of the own warp if there is one.
inline void yield() {
  const int first = self->index / 32 * 32, lane = self->index % 32;
  for (int i = 1; i < 32; ++i) {
    Fibre& next = block.fibres[first + (lane + 32 + i * block.direction) % 32];
    if (next.state == State::kReady) return switch_to(&next);
  }
  for (int i = 1; i < block.threads; ++i) {
    const int at = (self->index + block.threads + i * block.direction) % block.threads;
    if (block.fibres[at].state == State::kReady) return switch_to(&block.fibres[at]);
  }
  if (self->state == State::kReady) return;
  if (block.done == block.threads) return switch_to(&block.main);
  die("all threads of a block wait, or some returned before a barrier");
}

inline void entry() {
  block.kernel(block.params);
  self->state = State::kDone;
  if (!self->waited) block.left_early = true;
  ++block.done;
  yield();
  die("a finished thread was resumed");
}

inline void start(Fibre& fibre) {
  constexpr size_t kStack = 128 << 10;
  if (fibre.stack.empty()) fibre.stack.resize(kStack);
  fibre.state = State::kReady;
  fibre.waited = false;
  fibre.copies.clear();
  fibre.groups.clear();
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(fibre.stack.data() + kStack) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - 8;  // six registers, the address to return to
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(entry);
  fibre.stack_pointer = frame;
#else
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack.data();
  fibre.context.uc_stack.ss_size = kStack;
  makecontext(&fibre.context, entry, 0);
#endif
}

// All SIZE threads of a warp (32) or warpgroup (128) meet here; the last to come runs `operation` on
// the arguments of all.
template <int SIZE>
inline void collective(Operation operation, void* argument) {
  const int first = self->index / SIZE * SIZE;
  self->operation = reinterpret_cast<const void*>(operation);
  self->argument = argument;
  int& arrived = SIZE == 32 ? block.in_warp[first / 32] : block.in_group[first / 128];
  if (++arrived < SIZE) {
    self->state = State::kInGroup;
    yield();
    return;
  }
  arrived = 0;
  void* arguments[SIZE];
  Fibre* threads = &block.fibres[first];
  for (int i = 0; i < SIZE; ++i) {
    if (threads[i].operation != self->operation) die("threads are in different collectives");
    arguments[i] = threads[i].argument;
    threads[i].state = State::kReady;
  }
  operation(arguments);
}
inline void warp_collective(Operation operation, void* argument) {
  collective<32>(operation, argument);
}

// The `value` of the warp's thread `lane`: __shfl_sync.
template <class T>
inline T shuffle(T value, int lane) {
  struct Lane { T value; int from; T got; } mine{value, lane, {}};
  warp_collective([](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<Lane*>(lanes[i]);
      to->got = static_cast<Lane*>(lanes[to->from])->value;
    }
  }, &mine);
  return mine.got;
}

// For a thread that waits in a loop: lets all others go first.
inline void pause() {
  for (int i = 1; i < block.threads; ++i) {
    const int at = (self->index + block.threads + i * block.direction) % block.threads;
    if (block.fibres[at].state == State::kReady) return switch_to(&block.fibres[at]);
  }
}

inline void block_barrier() {
  if (++block.in_block < block.threads) {
    self->state = State::kInBlock;
    yield();
    return;
  }
  block.in_block = 0;
  for (int i = 0; i < block.threads; ++i) block.fibres[i].state = State::kReady;
}

// A copy is made as late as the waits allow, so that a missing wait is seen.
inline void complete_copies(size_t pending) {
  auto& groups = self->groups;
  if (groups.size() <= pending) return;
  const size_t finished = groups.size() - pending, end = groups[finished - 1];
  for (size_t i = 0; i < end; ++i) {
    const Copy& copy = self->copies[i];
    if (copy.valid) std::memcpy(copy.to, copy.from, copy.bytes);
    else std::memset(copy.to, 0, copy.bytes);
  }
  self->copies.erase(self->copies.begin(), self->copies.begin() + static_cast<long>(end));
  groups.erase(groups.begin(), groups.begin() + static_cast<long>(finished));
  for (size_t& group : groups) group -= end;
}

// Copies that were asked for before the wait may be made before it: here they are. All that others can
// do before theirs is done too, so that memory seldom changes hands.
inline void wait_for_previous() {
  if (self->waited) return;
  complete_copies(0);
  self->waited = true;
  pause();
  show(true);
}

inline void run_block(int direction) {
  block.left_early = false;
  block.direction = direction;
  block.done = block.in_block = 0;
  std::memset(block.in_warp, 0, sizeof(block.in_warp));
  std::memset(block.in_group, 0, sizeof(block.in_group));
  for (int i = 0; i < block.threads; ++i) {
    block.fibres[i].index = i;
    start(block.fibres[i]);
  }
  self = &block.main;
  switch_to(&block.fibres[direction > 0 ? 0 : block.threads - 1]);
}

struct Grid {
  int x = 1, y = 1, z = 1;
};

// Runs `block.kernel` over a grid. Shared memory is exactly `shared_bytes`, poisoned for every block.
// Returns 0, 1 if a block wrote behind its shared memory, 2 if a thread ended without waiting for the
// kernel in front although it overlaps with that.
inline int run_grid(const void* params, Grid grid, int threads, int shared_bytes, int direction,
                    bool overlaps) {
  constexpr unsigned char kPoison = 0xff;  // a NaN in every type
  constexpr int kGuard = 256;
  std::vector<unsigned char> shared(static_cast<size_t>(shared_bytes) + 1024 + kGuard);
  auto* start = shared.data() + (1024 - reinterpret_cast<uintptr_t>(shared.data()) % 1024);
  block.params = params;
  block.threads = threads;
  block.grid_x = grid.x;
  block.grid_y = grid.y;
  block.shared = reinterpret_cast<char*>(start);
  block.shared_bytes = shared_bytes;
  for (block.z = 0; block.z < grid.z; ++block.z) {
    for (block.y = 0; block.y < grid.y; ++block.y) {
      for (block.x = 0; block.x < grid.x; ++block.x) {
        std::memset(start, kPoison, static_cast<size_t>(shared_bytes) + kGuard);
        run_block(direction);
        if (overlaps && block.left_early) return 2;
        for (int i = 0; i < kGuard; ++i) {
          if (start[shared_bytes + i] != kPoison) return 1;
        }
      }
    }
  }
  return 0;
}

}  // namespace vf_host
