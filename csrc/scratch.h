// One block of memory, laid out by the same code twice: first to measure it, then to hand it out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <utility>

namespace HDC_ISA {

// What a thread's last call gave back, for its next one: fresh pages from the system cost as much as a tenth
// of a medium-sized call. Anything larger than KEPT goes back to the system at once.
class Kept {
    static constexpr size_t KEPT = 16 << 20;
    void* memory = nullptr;
    size_t size = 0;

    Kept() = default;

  public:
    ~Kept() { std::free(memory); }

    static Kept& of_this_thread() {
        static thread_local Kept kept;
        return kept;
    }

    // A block of at least `wanted`, which becomes its true size; or null.
    void* take(size_t& wanted) {
        if (size < wanted) return nullptr;
        wanted = std::exchange(size, 0);
        return std::exchange(memory, nullptr);
    }

    void give_back(void* block, size_t block_size) {
        if (block_size <= KEPT && block_size > size) {
            std::swap(memory, block);
            size = block_size;
        }
        std::free(block);
    }
};

class Scratch {
    static constexpr size_t ALIGNMENT = 64;
    char* memory = nullptr;
    size_t used = 0, most = ALIGNMENT;  // of this layout; of all, or what was allocated

  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() {
        if (memory) Kept::of_this_thread().give_back(memory, most);
    }

    // Begins a layout. Before `allocate` the pointers it hands out are null.
    void rewind() { used = 0; }

    template <typename T>
    void take(T*& pointer, int64_t count) {
        pointer = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
        used += (size_t(count) * sizeof(T) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        most = std::max(most, used);
    }

    // Gets as much as the largest layout so far needs; false if there is not so much.
    bool allocate() {
        memory = static_cast<char*>(Kept::of_this_thread().take(most));
        if (!memory) memory = static_cast<char*>(std::aligned_alloc(ALIGNMENT, most));
        return memory != nullptr;
    }
};

}  // namespace HDC_ISA
