//! The driver's linker: several PTX images become one that can be loaded, and what cannot be linked is refused by name.

#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "each passes a call the arguments that it declares, or wrong ones on purpose"
)]

mod support;

use cudarc::driver::sys::{self, CUjit_option, CUjitInputType, CUresult};
use cudarc::driver::{LaunchConfig, PushKernelArg};
use std::ffi::{CString, c_char, c_void};
use support::{device, last_message, load};

const HEAD: &str = ".version 8.0\n.target sm_80\n.address_size 64\n";

/// Stores `own + table[i] + twice(i)` for every thread: `own` is its own image's, `table` and `twice` are another's.
const CALLER: &str = "
.extern .global .align 4 .b32 table[4];
.global .align 4 .u32 own = 1000;
.extern .func (.param .b32 out) twice(.param .b32 in);
.extern .shared .align 4 .b8 scratch[];
.weak .func (.param .b32 out) which() { st.param.b32 [out], 1; ret; }
.visible .entry sum(.param .u64 to)
{
    .reg .b32 %r<9>;
    .reg .b64 %d<4>;
    ld.param.u64 %d0, [to];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %d1, %r0, 4;
    mov.u64 %d2, table;
    add.u64 %d2, %d2, %d1;
    ld.global.u32 %r1, [%d2];
    ld.global.u32 %r2, [own];
    {
        .param .b32 a;
        .param .b32 b;
        st.param.b32 [a], %r0;
        call (b), twice, (a);
        ld.param.b32 %r3, [b];
    }
    {
        .param .b32 b;
        call (b), which, ();
        ld.param.b32 %r4, [b];
    }
    add.u32 %r1, %r1, %r2;
    add.u32 %r1, %r1, %r3;
    mad.lo.u32 %r1, %r4, 10000, %r1;
    mov.u32 %r5, scratch;
    shl.b32 %r6, %r0, 2;
    add.u32 %r5, %r5, %r6;
    st.shared.u32 [%r5], %r1;
    ld.shared.u32 %r1, [%r5];
    add.u64 %d0, %d0, %d1;
    st.global.u32 [%d0], %r1;
    ret;
}
";

const CALLEE: &str = "
.visible .global .align 4 .u32 table[4] = {10, 20, 30, 40};
.global .align 4 .u32 own = 2;
.extern .shared .align 8 .b8 scratch[];
.visible .func (.param .b32 out) which() { st.param.b32 [out], 2; ret; }
.visible .func (.param .b32 out) twice(.param .b32 in)
{
    .reg .b32 %r<4>;
    ld.param.b32 %r0, [in];
    ld.global.u32 %r1, [own];
    mul.lo.u32 %r0, %r0, %r1;
    st.param.b32 [out], %r0;
    ret;
}
";

struct Link {
    state: sys::CUlinkState,
    /// The log and what its size option says; both must outlive the link.
    log: Box<[u8; 256]>,
    options: Box<[CUjit_option; 2]>,
    values: Box<[*mut c_void; 2]>,
}

impl Link {
    fn new() -> Link {
        let mut log = Box::new([0u8; 256]);
        let mut options =
            Box::new([CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES]);
        let mut values = Box::new([log.as_mut_ptr().cast(), 256 as *mut c_void]);
        let mut state = std::ptr::null_mut();
        let made = unsafe { sys::cuLinkCreate_v2(2, options.as_mut_ptr(), values.as_mut_ptr(), &mut state) };
        assert_eq!(made, CUresult::CUDA_SUCCESS);
        Link { state, log, options, values }
    }

    fn add_as(&self, kind: CUjitInputType, name: &str, text: &str) -> CUresult {
        let (text, name) = (CString::new(text).unwrap(), CString::new(name).unwrap());
        let bytes = text.as_bytes_with_nul();
        let (no_options, no_values) = (std::ptr::null_mut(), std::ptr::null_mut());
        let data = bytes.as_ptr() as *mut c_void;
        unsafe { sys::cuLinkAddData_v2(self.state, kind, data, bytes.len(), name.as_ptr(), 0, no_options, no_values) }
    }

    fn add(&self, name: &str, body: &str) {
        let added = self.add_as(CUjitInputType::CU_JIT_INPUT_PTX, name, &format!("{HEAD}{body}"));
        assert_eq!(added, CUresult::CUDA_SUCCESS, "{}", last_message());
    }

    fn complete(&self) -> Result<Vec<u8>, CUresult> {
        let (mut image, mut bytes) = (std::ptr::null_mut(), 0);
        match unsafe { sys::cuLinkComplete(self.state, &mut image, &mut bytes) } {
            CUresult::CUDA_SUCCESS => {
                Ok(unsafe { std::slice::from_raw_parts(image.cast::<u8>().cast_const(), bytes) }.to_vec())
            }
            why => Err(why),
        }
    }

    /// The error log, as long as its size option says.
    fn errors(&self) -> String {
        let length = self.values[1] as usize;
        String::from_utf8(self.log[..length].to_vec()).unwrap()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        assert_eq!(unsafe { sys::cuLinkDestroy(self.state) }, CUresult::CUDA_SUCCESS);
        assert_eq!(self.options.len(), self.values.len());
    }
}

/// The refusal of a link of these images, as the code and the log say.
fn refused(images: &[(&str, &str)]) -> (CUresult, String) {
    let link = Link::new();
    for (name, body) in images {
        link.add(name, body);
    }
    (link.complete().expect_err("the images do not link"), link.errors())
}

#[test]
fn names_are_resolved_over_the_images_in_any_order() {
    load(&[]);
    let (context, stream) = device(0);
    context.bind_to_thread().unwrap();
    for order in [[("caller", CALLER), ("callee", CALLEE)], [("callee", CALLEE), ("caller", CALLER)]] {
        let link = Link::new();
        order.iter().for_each(|(name, body)| link.add(name, body));
        let linked = link.complete().unwrap_or_else(|why| panic!("{why:?}: {}", link.errors()));
        drop(link);
        // A copy of as many bytes as the linker says is an image, the link itself is not needed any more.
        let mut module = std::ptr::null_mut();
        let mut function = std::ptr::null_mut();
        let mut to = stream.alloc_zeros::<u32>(4).unwrap();
        let (mut address, _guard) = cudarc::driver::DevicePtrMut::device_ptr_mut(&mut to, &stream);
        let mut params = [(&raw mut address).cast::<c_void>()];
        unsafe {
            assert_eq!(sys::cuModuleLoadData(&mut module, linked.as_ptr().cast()), CUresult::CUDA_SUCCESS);
            let name = c"sum".as_ptr();
            assert_eq!(sys::cuModuleGetFunction(&mut function, module, name), CUresult::CUDA_SUCCESS);
            let (params, none) = (params.as_mut_ptr(), std::ptr::null_mut());
            let launched = sys::cuLaunchKernel(function, 1, 1, 1, 4, 1, 1, 16, stream.cu_stream(), params, none);
            assert_eq!(launched, CUresult::CUDA_SUCCESS, "{}", last_message());
        }
        drop(_guard);
        // The strong `which` says 2, the caller's own `own` is 1000, the callee's 2.
        let expected = [0u32, 1, 2, 3].map(|i| 20_000 + 1000 + 10 * (i + 1) + 2 * i);
        assert_eq!(stream.clone_dtoh(&to).unwrap(), expected);
        assert_eq!(unsafe { sys::cuModuleUnload(module) }, CUresult::CUDA_SUCCESS);
    }
}

/// Declares `keep` with a return value and `give` without. The 12-byte parameter is passed on whole.
const OTHER_LANGUAGE: &str = "
.extern .func (.param .b64 out) keep(.param .b64 to, .param .align 4 .b8 three[12]);
.extern .func give(.param .b64 to);
.visible .entry both(.param .u64 to)
{
    .reg .b64 %d<3>;
    ld.param.u64 %d0, [to];
    {
        .param .b64 a;
        .param .align 4 .b8 b[12];
        .param .b64 r;
        st.param.b64 [a], %d0;
        st.param.b32 [b], 5;
        st.param.b32 [b+4], 6;
        st.param.b32 [b+8], 7;
        call (r), keep, (a, b);
        ld.param.b64 %d1, [r];
    }
    add.u64 %d0, %d0, 12;
    {
        .param .b64 a;
        st.param.b64 [a], %d0;
        call give, (a);
    }
    ret;
}
";

const OTHER_LANGUAGE_CALLEE: &str = "
.visible .func keep(.param .b64 to, .param .align 4 .b8 three[12])
{
    .reg .b32 %r<3>;
    .reg .b64 %d;
    ld.param.b64 %d, [to];
    ld.param.b32 %r0, [three];
    ld.param.b32 %r1, [three+4];
    ld.param.b32 %r2, [three+8];
    st.global.b32 [%d], %r0;
    st.global.b32 [%d+4], %r1;
    st.global.b32 [%d+8], %r2;
    ret;
}
.visible .func (.param .b32 out) give(.param .b64 to)
{
    .reg .b64 %d;
    ld.param.b64 %d, [to];
    st.global.b32 [%d], 8;
    st.param.b32 [out], 9;
    ret;
}
";

#[test]
fn a_function_may_return_something_for_one_image_and_nothing_for_another() {
    load(&[]);
    let (context, stream) = device(0);
    context.bind_to_thread().unwrap();
    let link = Link::new();
    link.add("caller", OTHER_LANGUAGE);
    link.add("callee", OTHER_LANGUAGE_CALLEE);
    let linked = link.complete().unwrap_or_else(|why| panic!("{why:?}: {}", link.errors()));
    let text = CString::from_vec_with_nul(linked).unwrap().into_string().unwrap();
    let both = support::kernel(&context, &text, "both");
    let mut to = stream.alloc_zeros::<u32>(4).unwrap();
    let mut launch = stream.launch_builder(&both);
    launch.arg(&mut to);
    let one = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
    unsafe { launch.launch(one) }.unwrap_or_else(|why| panic!("{why:?}: {}", last_message()));
    assert_eq!(stream.clone_dtoh(&to).unwrap(), [5, 6, 7, 8]);
}

/// Calls its image's own `hidden`, and what another image's table holds.
const BY_ADDRESS: &str = "
.extern .global .align 8 .b64 table[3];
.func (.param .b32 out) hidden(.param .b32 in) { st.param.b32 [out], 7; ret; }
.visible .global .align 8 .u64 own = hidden;
.visible .entry all(.param .u64 to)
{
    .reg .b32 %r<4>;
    .reg .b64 %d<8>;
    .reg .pred %p;
    .param .b32 a;
    .param .b32 b;
    proto: .callprototype (.param .b32 _) _ (.param .b32 _);
    ld.param.u64 %d0, [to];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %d1, %r0, 8;
    mov.u64 %d2, table;
    add.u64 %d2, %d2, %d1;
    ld.global.u64 %d3, [own];
    setp.lt.u32 %p, %r0, 3;
    @%p ld.global.u64 %d3, [%d2];
    st.param.b32 [a], %r0;
    call (b), %d3, (a), proto;
    ld.param.b32 %r1, [b];
    mul.wide.u32 %d1, %r0, 4;
    add.u64 %d0, %d0, %d1;
    st.global.u32 [%d0], %r1;
    ret;
}
";

const TABLE: &str = "
.extern .func (.param .b32 out) thrice(.param .b32 in);
.func (.param .b32 out) hidden(.param .b32 in) { st.param.b32 [out], 5; ret; }
.visible .global .align 8 .u64 table[3] = {hidden, thrice, hidden};
";

const THRICE: &str = "
.visible .func (.param .b32 out) thrice(.param .b32 in)
{
    .reg .b32 %r;
    ld.param.b32 %r, [in];
    mul.lo.u32 %r, %r, 3;
    st.param.b32 [out], %r;
    ret;
}
";

#[test]
fn tables_of_functions_are_linked_too() {
    load(&[]);
    let (context, stream) = device(0);
    context.bind_to_thread().unwrap();
    let images = [("kernel", BY_ADDRESS), ("table", TABLE), ("thrice", THRICE)];
    for first in 0..3 {
        let link = Link::new();
        (0..3).map(|at| images[(first + at) % 3]).for_each(|(name, body)| link.add(name, body));
        let linked = link.complete().unwrap_or_else(|why| panic!("{why:?}: {}", link.errors()));
        let text = CString::from_vec_with_nul(linked).unwrap().into_string().unwrap();
        let all = support::kernel(&context, &text, "all");
        let mut to = stream.alloc_zeros::<u32>(4).unwrap();
        let mut launch = stream.launch_builder(&all);
        launch.arg(&mut to);
        let four = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (4, 1, 1), shared_mem_bytes: 0 };
        unsafe { launch.launch(four) }.unwrap_or_else(|why| panic!("{why:?}: {}", last_message()));
        assert_eq!(stream.clone_dtoh(&to).unwrap(), [5, 3, 5, 7]);
    }
}

#[test]
fn one_image_stays_as_it_is() {
    load(&[]);
    let (context, _stream) = device(0);
    context.bind_to_thread().unwrap();
    let link = Link::new();
    link.add("callee", CALLEE);
    let text = format!("{HEAD}{CALLEE}\0");
    assert_eq!(link.complete(), Ok(text.into_bytes()));
    assert_eq!(link.errors(), "");
    // Once complete, it stays complete.
    assert!(link.complete().is_ok());
    let late = link.add_as(CUjitInputType::CU_JIT_INPUT_PTX, "late", HEAD);
    assert_eq!(late, CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn what_does_not_link_is_refused_by_name() {
    load(&[]);
    let (context, _stream) = device(0);
    context.bind_to_thread().unwrap();
    let says = |images: &[(&str, &str)], words: &[&str]| {
        let (code, log) = refused(images);
        assert_eq!(code, CUresult::CUDA_ERROR_INVALID_PTX);
        for word in words {
            assert!(log.contains(word), "`{word}` is not in: {log}");
        }
    };
    let twice = "\n.visible .global .u32 table = 1;\n";
    says(&[("a", CALLEE), ("b", twice)], &["image b", "table is defined twice", "image a", "line 5"]);
    says(&[("a", CALLER), ("b", "")], &["image a", "no image defines table"]);
    let table = ".visible .global .u32 table[4];";
    says(&[("a", CALLER), ("b", table)], &["call of twice", "only declares"]);
    // Another signature than the caller's.
    let other = "
        .visible .global .u32 table[4];
        .visible .func (.param .b32 out) twice(.param .b32 in, .param .b32 more)
        { .reg .b32 %r<2>; ld.param.b32 %r0, [more]; st.param.b32 [out], %r0; ret; }";
    says(&[("a", CALLER), ("b", other)], &["image a", "twice is declared with other parameters", "image b"]);
    says(&[("a", "\n.visible .func f() {"), ("b", "")], &["image a", "never closed"]);
    says(&[("a", "\n.tex .u64 t;"), ("b", "")], &["image a", ".tex"]);
    let (code, log) = refused(&[]);
    assert_eq!((code, log.contains("no image")), (CUresult::CUDA_ERROR_INVALID_VALUE, true), "{log}");
}

/// Every block writes, all wait, every block reads what the next one wrote.
const GRID: &str = "
.extern .func (.param .b64 handle) cudaCGGetIntrinsicHandle(.param .b32 scope);
.extern .func (.param .b32 error) cudaCGSynchronize(.param .b64 handle, .param .b32 flags);
.visible .entry shift(.param .u64 to, .param .u32 rounds)
{
    .reg .pred %p;
    .reg .b32 %r<9>;
    .reg .b64 %d<9>;
    .param .b32 scope;
    .param .b32 flags;
    .param .b32 error;
    .param .b64 handle;
    ld.param.u64 %d0, [to];
    ld.param.u32 %r7, [rounds];
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %tid.x;
    mad.lo.u32 %r2, %r0, %r1, %r2;
    mul.wide.u32 %d1, %r2, 4;
    add.u64 %d1, %d0, %d1;
    mov.u32 %r3, %nctaid.x;
    mul.lo.u32 %r3, %r3, %r1;
    add.u32 %r4, %r2, %r1;
    rem.u32 %r4, %r4, %r3;
    mul.wide.u32 %d2, %r4, 4;
    add.u64 %d2, %d0, %d2;
    st.param.b32 [scope], 1;
    call (handle), cudaCGGetIntrinsicHandle, (scope);
    ld.param.b64 %d3, [handle];
    st.param.b32 [flags], 0;
again:
    st.param.b64 [handle], %d3;
    call (error), cudaCGSynchronize, (handle, flags);
    ld.volatile.global.u32 %r5, [%d2];
    st.param.b64 [handle], %d3;
    call (error), cudaCGSynchronize, (handle, flags);
    ld.param.b32 %r6, [error];
    add.u32 %r5, %r5, %r6;
    st.volatile.global.u32 [%d1], %r5;
    sub.u32 %r7, %r7, 1;
    setp.ne.s32 %p, %r7, 0;
    @%p bra again;
    ret;
}
";

#[test]
fn the_device_runtime_has_the_barrier_of_a_grid() {
    load(&[]);
    let (context, stream) = device(0);
    context.bind_to_thread().unwrap();
    let link = Link::new();
    link.add("grid", GRID);
    for name in ["libcudadevrt.a", "/usr/lib/libcudadevrt.a"] {
        let added = link.add_as(CUjitInputType::CU_JIT_INPUT_LIBRARY, name, "!<arch>");
        assert_eq!(added, CUresult::CUDA_SUCCESS);
    }
    let linked = link.complete().unwrap_or_else(|why| panic!("{why:?}: {}", link.errors()));
    let text = CString::from_vec_with_nul(linked).unwrap().into_string().unwrap();
    let shift = support::kernel(&context, &text, "shift");
    for seed in ["none", "1", "2", "3"] {
        support::configure("seed", seed);
        let mut to = stream.clone_htod(&(0..256u32).collect::<Vec<_>>()).unwrap();
        let mut launch = stream.launch_builder(&shift);
        launch.arg(&mut to).arg(&3u32);
        let four = LaunchConfig { grid_dim: (4, 1, 1), block_dim: (64, 1, 1), shared_mem_bytes: 0 };
        unsafe { launch.launch_cooperative(four) }.unwrap_or_else(|why| panic!("{why:?}: {}", last_message()));
        let expected: Vec<u32> = (0..256).map(|i| (i + 3 * 64) % 256).collect();
        assert_eq!(stream.clone_dtoh(&to).unwrap(), expected, "seed {seed}");
    }
    // Without a cooperative launch there is no such barrier, as its answer says.
    let mut to = stream.clone_htod(&[0u32; 64]).unwrap();
    let mut launch = stream.launch_builder(&shift);
    launch.arg(&mut to).arg(&1u32);
    let one = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (64, 1, 1), shared_mem_bytes: 0 };
    unsafe { launch.launch(one) }.unwrap();
    assert_eq!(stream.clone_dtoh(&to).unwrap(), [1; 64]);
    // A program that names the library without need has its image as it was.
    let link = Link::new();
    let added = link.add_as(CUjitInputType::CU_JIT_INPUT_LIBRARY, "cudadevrt", "!<arch>");
    assert_eq!(added, CUresult::CUDA_SUCCESS);
    link.add("callee", CALLEE);
    assert_eq!(link.complete(), Ok(format!("{HEAD}{CALLEE}\0").into_bytes()));
}

#[test]
fn machine_code_cannot_be_linked() {
    load(&[]);
    let (context, _stream) = device(0);
    context.bind_to_thread().unwrap();
    let link = Link::new();
    for kind in [
        CUjitInputType::CU_JIT_INPUT_FATBINARY,
        CUjitInputType::CU_JIT_INPUT_OBJECT,
        CUjitInputType::CU_JIT_INPUT_LIBRARY,
    ] {
        assert_eq!(link.add_as(kind, "x", HEAD), CUresult::CUDA_ERROR_NOT_SUPPORTED);
        assert!(link.errors().contains("not emulated"), "{}", link.errors());
    }
    let elf = link.add_as(CUjitInputType::CU_JIT_INPUT_CUBIN, "x", "\u{7f}ELF");
    assert_eq!(elf, CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    let mut missing = *b"/nowhere/at/all.ptx\0";
    let kind = CUjitInputType::CU_JIT_INPUT_PTX;
    let path = missing.as_mut_ptr().cast::<c_char>();
    let (no_options, no_values) = (std::ptr::null_mut(), std::ptr::null_mut());
    let answer = unsafe { sys::cuLinkAddFile_v2(link.state, kind, path, 0, no_options, no_values) };
    assert_eq!(answer, CUresult::CUDA_ERROR_FILE_NOT_FOUND);
}
