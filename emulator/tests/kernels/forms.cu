// Instruction forms that kernels write by hand: cache hints, reductions without a result, 16- and 64-bit
// compare-and-swap, small asynchronous copies with sizes, barriers of every kind, products of packed bytes, jump
// tables.

extern "C" __global__ void packed(const int *a, const int *b, int *out) {
    const int i = threadIdx.x;
    int mixed;
    asm("dp4a.s32.u32 %0, %1, %2, %3;" : "=r"(mixed) : "r"(a[i]), "r"(b[i]), "r"(1));
    out[i * 5] = __dp4a(a[i], b[i], 7);
    out[i * 5 + 1] = (int)__dp4a((unsigned)a[i], (unsigned)b[i], 7u);
    out[i * 5 + 2] = __dp2a_lo(a[i], b[i], 3);
    out[i * 5 + 3] = (int)__dp2a_hi((unsigned)a[i], (unsigned)b[i], 3u);
    out[i * 5 + 4] = mixed;
}

// 64 threads: 4 and 8 bytes through the first-level cache, then 16 of which some are zeros.
extern "C" __global__ void small_copies(const int *in, int *out) {
    __shared__ __align__(16) int s[128];
    const int t = threadIdx.x;
    const unsigned one = (unsigned)__cvta_generic_to_shared(&s[t]);
    const unsigned two = (unsigned)__cvta_generic_to_shared(&s[64 + 2 * (t % 32)]);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(one), "l"(in + t));
    if (t < 32) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(two), "l"(in + 64 + 2 * t));
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads(); // what all have copied is there
    out[t] = s[63 - t];
    out[64 + t] = s[127 - t];
    __syncthreads(); // all have read
    if (t < 32) {
        const unsigned four = (unsigned)__cvta_generic_to_shared(&s[4 * t]);
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(four), "l"(in + 4 * t), "r"(t % 17));
    }
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads(); // what all have copied is there
    out[128 + t] = s[t];
    out[192 + t] = s[64 + t];
}

extern "C" __global__ void hints(const int4 *a, int4 *out) {
    const int i = threadIdx.x;
    int4 u, v, w;
    asm volatile("ld.global.nc.L1::no_allocate.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(u.x), "=r"(u.y), "=r"(u.z), "=r"(u.w)
                 : "l"(a + i));
    asm volatile("ld.global.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(a + i));
    asm volatile("ld.global.nc.L1::evict_last.L2::256B.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                 : "l"(a + i));
    const int4 x = __ldcs(a + i), y = __ldg(a + i);
    asm volatile("prefetch.global.L2 [%0];" ::"l"(a));
    asm volatile("st.global.L1::no_allocate.v4.s32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(out + i), "r"(u.x + v.x), "r"(w.y), "r"(x.z), "r"(y.w));
    __stcs(out + 32 + i, u);
    __stwt(out + 64 + i, v);
}

extern "C" __global__ void reductions(int *i, float *f, double *d, unsigned long long *u) {
    const int t = threadIdx.x;
    unsigned long long before;
    unsigned short half;
    asm volatile("red.global.add.s32 [%0], %1;" ::"l"(i), "r"(t) : "memory");
    asm volatile("red.relaxed.gpu.global.max.s32 [%0], %1;" ::"l"(i + 1), "r"(t) : "memory");
    asm volatile("red.release.gpu.global.or.b32 [%0], %1;" ::"l"(i + 2), "r"(1 << (t & 31)) : "memory");
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(f), "f"(t * 0.5f) : "memory");
    asm volatile("red.global.add.f64 [%0], %1;" ::"l"(d), "d"(t * 0.5) : "memory");
    asm volatile("red.global.add.u64 [%0], %1;" ::"l"(u), "l"((unsigned long long)t) : "memory");
    asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(before)
                 : "l"(u + 1), "l"(0ull), "l"(77ull)
                 : "memory");
    asm volatile("atom.global.cas.b16 %0, [%1], %2, %3;"
                 : "=h"(half)
                 : "l"(u + 2), "h"((unsigned short)0), "h"((unsigned short)9)
                 : "memory");
    asm volatile("red.global.add.noftz.f16x2 [%0], %1;" ::"l"(u + 3), "r"(0x3c003c00) : "memory");
    asm volatile("red.global.add.noftz.bf16x2 [%0], %1;" ::"l"(u + 4), "r"(0x3f803f80) : "memory");
    atomicAdd(i + 5, before == 0); // one thread found it so
    atomicAdd(i + 6, half == 0);
    atomicAdd_block(i + 3, 1);
    atomicAdd_system(i + 4, 1);
    atomicMin((long long *)(u + 5), (long long)-t);
    atomicMax(u + 6, (unsigned long long)t);
    atomicAnd(u + 7, ~(1ull << t));
}

// 64 threads: counts and votes by barriers, barriers with names, with a number of threads, arrivals that do not wait.
extern "C" __global__ void barriers(int *out) {
    const int t = threadIdx.x;
    int count, all;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %1, 0; bar.red.popc.u32 %0, 0, p; }" : "=r"(count) : "r"(t % 3));
    asm volatile("{ .reg .pred p, q; setp.ne.s32 p, %1, 0; barrier.red.and.pred q, 1, 64, p; "
                 "selp.s32 %0, 1, 0, q; }"
                 : "=r"(all)
                 : "r"(t + 1));
    asm volatile("barrier.sync 2;" ::: "memory");
    asm volatile("barrier.sync.aligned 3, 64;" ::: "memory");
    asm volatile("barrier.arrive 4, 128;" ::: "memory");
    out[t] = count + 1000 * all;
}

extern "C" __global__ void cases(const int *in, int *out, int n) {
    const int i = threadIdx.x;
    if (i >= n) {
        return;
    }
    const int v = in[i];
    int r = 1;
    switch (v & 15) {
    case 0: r = v * 3; break;
    case 1: r = v ^ 7; break;
    case 2: r = v << 2; break;
    case 3: r = v / 3; break;
    case 4: r = v % 5; break;
    case 5: r = -v; break;
    case 6: r = v * v; break;
    case 7: r = v + 100; break;
    case 8: r = ~v; break;
    case 9: r = v >> 1; break;
    case 10: r = v * 11; break;
    case 11: r = v - 9; break;
    case 12: r = __popc(v); break;
    case 13: r = __clz(v); break;
    case 14: r = __brev(v); break;
    }
    out[i] = r;
}
