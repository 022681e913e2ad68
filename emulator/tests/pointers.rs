//! Calls through functions' addresses: nvcc's tables of functions, pointers in variables and arguments, virtual
//! functions; and hand-written PTX for what must be refused.

mod machine;

use cuda_emu::exec::{Fault, FaultKind, LoadedModule};
use cuda_emu::ptx;
use machine::{Arg, Device};
use std::sync::Arc;

const POINTERS: &str = include_str!("kernels/pointers.ptx");

/// An 8-byte word of a variable.
fn word(device: &Device, variable: &str, index: u64) -> u64 {
    let (at, _) = device.module.global(variable).unwrap_or_else(|| panic!("no variable {variable}"));
    device.download::<u64>(at + 8 * index, 1)[0]
}

fn multiply(a: f32, b: f32) -> f32 {
    b * (a as i32).max(0) as f32
}

#[test]
fn lanes_that_call_different_functions_meet_again() {
    let n = 75usize;
    let x: Vec<f32> = (0..n).map(|i| (i % 9) as f32).collect();
    let which: Vec<i32> = (0..n).map(|i| (i * i % 3) as i32).collect();
    for seed in [None, Some(1), Some(2)] {
        let mut device = Device::new(POINTERS);
        device.settings.schedule_seed = seed;
        let out = device.memory.alloc(3 * 4 * n as u64).expect("memory");
        let args = [Arg::U64(out), Arg::U64(device.upload(&x)), Arg::U64(device.upload(&which)), Arg::U32(n as u32)];
        let counters =
            device.run("by_table", [2, 1, 1], [64, 1, 1], 0, &args).unwrap_or_else(|fault| panic!("{fault}"));
        let found: Vec<f32> = device.download(out, 3 * n);
        for i in 0..n {
            let r = match which[i] {
                0 => x[i] + 2.0,
                1 => x[i] - 2.0,
                _ => multiply(x[i], 2.0),
            };
            let second = if i % 2 == 0 { multiply(r, 3.0) } else { r + 3.0 };
            let together = (n - i / 32 * 32).min(32) as f32;
            assert_eq!(found[3 * i..][..3], [together, r, second], "element {i}");
        }
        assert!(counters.divergent_branches >= 6, "{counters:?}");
    }
}

#[test]
fn a_pointer_read_from_a_variable_is_an_argument() {
    let device = Device::new(POINTERS);
    let functions: [fn(f32) -> f32; 3] = [|x| x + 3.0, |x| x - 3.0, |x| multiply(x, 3.0)];
    for (index, function) in functions.into_iter().enumerate() {
        let out = device.memory.alloc(4 * 40).expect("memory");
        let args = [Arg::U64(out), Arg::U64(word(&device, "table", index as u64)), Arg::U32(40)];
        device.run("by_argument", [1; 3], [64, 1, 1], 0, &args).unwrap_or_else(|fault| panic!("{fault}"));
        let found: Vec<f32> = device.download(out, 40);
        assert!((0..40).all(|i| found[i] == function(i as f32) + (i as f32 - 1.0)), "{index}: {found:?}");
    }
    assert_eq!(word(&device, "chosen", 0), word(&device, "table", 1), "one function has one address");
}

#[test]
fn virtual_functions_are_those_of_the_object() {
    let device = Device::new(POINTERS);
    let n = 50usize;
    let out = device.upload(&vec![-1f32; 64]);
    let args = [Arg::U64(out), Arg::U32(n as u32)];
    device.run("by_virtual", [1; 3], [64, 1, 1], 0, &args).unwrap_or_else(|fault| panic!("{fault}"));
    let found: Vec<f32> = device.download(out, 64);
    for (i, &found) in found.iter().enumerate() {
        let steps = (i % 4) as i32;
        let (square, disc) = (i as f32, (i + 1) as f32);
        let want = match i % 3 {
            _ if i >= n => -1.0,
            0 => (square + steps as f32).powi(2),
            1 => 3.0 * (disc * 2f32.powi(steps)).powi(2),
            _ => 1000.0 + steps as f32 - 3.0 * disc * disc,
        };
        assert_eq!(found, want, "object {i}");
    }
}

#[test]
fn structures_come_back_and_loops_call_again() {
    let device = Device::new(POINTERS);
    let (n, rounds) = (96usize, 7);
    let start: Vec<u64> = (0..n as u64).map(|i| i * 1000).collect();
    let (out, sums) = (device.upload(&start), device.memory.alloc(8 * n as u64).expect("memory"));
    let args = [Arg::U64(out), Arg::U64(sums), Arg::U32(rounds)];
    device.run("by_select", [3, 1, 1], [32, 1, 1], 0, &args).unwrap_or_else(|fault| panic!("{fault}"));
    let (found, sums): (Vec<u64>, Vec<f64>) = (device.download(out, n), device.download(sums, n));
    for i in 0..n {
        let want = (0..u64::from(rounds)).fold(start[i], |at, k| if i % 2 == 1 { at + k } else { at ^ k << 40 });
        let x = i as f64;
        let sum = if i % 5 != 0 { x * 0.5 + x } else { x * 0.25 - x };
        assert_eq!((found[i], sums[i]), (want, sum), "thread {i}");
    }
}

#[test]
fn functions_behind_pointers_may_have_barriers() {
    let device = Device::new(POINTERS);
    let out = device.upload(&[0i32; 4 * 64]);
    device.run("with_barriers", [4, 1, 1], [64, 1, 1], 0, &[Arg::U64(out)]).unwrap_or_else(|fault| panic!("{fault}"));
    let found: Vec<i32> = device.download(out, 4 * 64);
    for (i, &found) in found.iter().enumerate() {
        let (block, thread) = (i / 64, i % 64);
        let from = if block % 2 == 0 { (thread + 1) % 64 } else { 63 - thread };
        assert_eq!(found as usize, block * 64 + from, "thread {i}");
    }
}

#[test]
fn recursion_is_refused_when_it_happens() {
    let device = Device::new(POINTERS);
    let out = device.upload(&[7i32; 32]);
    let run = |n: u32| device.run("recursive", [1; 3], [32, 1, 1], 0, &[Arg::U64(out), Arg::U32(n)]);
    run(0).unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!(device.download::<i32>(out, 32), [0; 32]);
    let fault = run(2).expect_err("lane 0 calls count_down from count_down");
    assert_eq!((fault.kind, fault.thread), (FaultKind::Call, [0; 3]), "{fault}");
    assert!(fault.detail.contains("count_down") && fault.detail.contains("recursion is not supported"), "{fault}");
}

/// Functions of one signature (`twice`, `square`, `untaken`, and `elsewhere` without a body) and of another (`wide`),
/// and a kernel `k` with the array `out`, in `%p`, an array of functions, in `%g`, and the thread's number in `%t`.
fn module(body: &str) -> String {
    let function = |name: &str, instruction: &str| {
        format!(
            ".func (.param .b32 r) {name}(.param .b32 x)\n{{\n.reg .b32 %a;\nld.param.u32 %a, [x];\n{instruction}\n\
             st.param.b32 [r], %a;\nret;\n}}\n"
        )
    };
    format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.extern .func (.param .b32 r) elsewhere(.param .b32 x);\n\
         {}{}{}.func (.param .b64 r) wide(.param .b32 x)\n{{\nst.param.b64 [r], 5;\nret;\n}}\n\
         .global .u64 table[4] = {{twice, square, wide, elsewhere}};\n\
         .visible .entry k(.param .u64 out, .param .u64 functions)\n{{\n\
         .reg .b32 %r<8>, %t;\n.reg .b64 %p, %g, %q<4>;\n.reg .pred %c<4>;\n.param .b32 x0;\n.param .b32 y0;\n\
         mov.u32 %t, %tid.x;\nld.param.u64 %p, [out];\nmad.wide.u32 %p, %t, 4, %p;\n\
         ld.param.u64 %g, [functions];\nmad.wide.u32 %g, %t, 8, %g;\nld.global.u64 %q0, [%g];\n\
         st.param.b32 [x0], %t;\nst.param.b32 [y0], 77;\nproto: .callprototype (.param .b32 _) _ (.param .b32 _);\n\
         {body}\nld.param.b32 %r0, [y0];\nst.global.u32 [%p], %r0;\nret;\n}}\n",
        function("untaken", ""),
        function("twice", "add.u32 %a, %a, %a;"),
        function("square", "mul.lo.u32 %a, %a, %a;"),
    )
}

const CALL: &str = "call (y0), %q0, (x0), proto;";

/// Runs one warp whose lane l calls `functions[l]`.
fn call(device: &Device, functions: &[u64]) -> Result<(Vec<u32>, u64), Fault> {
    let mut functions = functions.to_vec();
    functions.resize(32, *functions.last().expect("a function"));
    let (out, given) = (device.upload(&[0u32; 32]), device.upload(&functions));
    let counters = device.run("k", [1; 3], [32, 1, 1], 0, &[Arg::U64(out), Arg::U64(given)])?;
    Ok((device.download(out, 32), counters.divergent_branches))
}

#[test]
fn a_warp_diverges_only_if_its_lanes_call_different_functions() {
    // The vote names all lanes, and comes right after the call.
    let device = Device::new(&module(&format!(
        "{CALL}\nsetp.ge.u32 %c0, %t, 0;\nvote.sync.all.pred %c1, %c0, -1;\n@!%c1 trap;"
    )));
    let [twice, square] = [0, 1].map(|index| word(&device, "table", index));
    assert!(twice != 0 && square != 0 && twice != square);
    assert_eq!(call(&device, &[twice]).expect("one function"), ((0..32).map(|t| 2 * t).collect(), 0));
    let mixed: Vec<u64> = (0..32).map(|t| if t % 3 == 0 { square } else { twice }).collect();
    let want = (0..32).map(|t| if t % 3 == 0 { t * t } else { 2 * t }).collect();
    assert_eq!(call(&device, &mixed).expect("two functions"), (want, 1));
}

#[test]
fn calls_under_a_predicate_and_addresses_from_instructions() {
    let device = Device::new(&module(&format!("setp.lt.u32 %c0, %t, 5;\n@!%c0 {CALL}")));
    let square = word(&device, "table", 1);
    let want: Vec<u32> = (0..32).map(|t| if t < 5 { 77 } else { t * t }).collect();
    assert_eq!(call(&device, &[square]).expect("some lanes call").0, want);
    // Excluded lanes may have no function.
    let some: Vec<u64> = (0..32).map(|t| if t < 5 { 0 } else { square }).collect();
    assert_eq!(call(&device, &some).expect("lanes without a function do not call").0, want);

    let device = Device::new(&module(&format!(
        "setp.lt.u32 %c0, %t, 5;\nselp.b64 %q0, square, twice, %c0;\n{CALL}\n\
         mov.u64 %q1, table;\nld.global.u64 %q1, [%q1];\nsetp.eq.u64 %c1, %q1, twice;\n@!%c1 trap;"
    )));
    let want: Vec<u32> = (0..32).map(|t| if t < 5 { t * t } else { 2 * t }).collect();
    assert_eq!(call(&device, &[0]).expect("addresses are operands").0, want);
}

#[test]
fn what_cannot_be_called_is_refused_with_its_reason() {
    let device = Device::new(&module(CALL));
    let [twice, _, wide, elsewhere] = [0, 1, 2, 3].map(|index| word(&device, "table", index));
    let other = LoadedModule::load(&device.memory, Arc::new(ptx::parse(&module(CALL)).expect("PTX"))).expect("memory");
    let (at, _) = other.global("table").expect("a variable");
    let foreign = device.download::<u64>(at, 1)[0];
    let table = device.module.global("table").expect("a variable").0;
    for (function, reason) in [
        (0, "calls a function through a null pointer"),
        (table, "where no function begins"),
        (twice + 4, "where no function of the kernel's module begins"),
        (1 << 63, "where no function begins"),
        (!0, "where no function begins"),
        (foreign, "where no function of the kernel's module begins"),
        (twice + 16 * 1000, "where no function of the kernel's module begins"),
        (wide, "wide, which takes 4 bytes and returns 8 bytes, by a prototype that takes 4 bytes and returns 4 bytes"),
        (elsewhere, "calls elsewhere, which this module only declares"),
        (twice - 16, "calls untaken, whose address nothing in the module takes"),
    ] {
        let fault = call(&device, &[twice, twice, function]).expect_err(reason);
        assert_eq!((fault.kind, fault.code(), fault.thread), (FaultKind::Call, 718, [2, 0, 0]), "{fault}");
        assert!(fault.detail.contains(reason), "{reason}: {fault}");
        assert!(fault.kernel == "k" && fault.instruction == CALL && fault.line > 20, "{fault}");
    }
}

#[test]
fn only_listed_targets_may_be_called() {
    let text = module("list: .calltargets twice, untaken;\ncall (y0), %q0, (x0), list;");
    let device = Device::new(&text);
    let [twice, square] = [0, 1].map(|index| word(&device, "table", index));
    assert_eq!(call(&device, &[twice]).expect("a listed function").0[3], 6);
    // Its address is nowhere taken, but it is listed.
    assert_eq!(call(&device, &[twice - 16]).expect("a listed function").0[3], 3);
    let fault = call(&device, &[square]).expect_err("not listed");
    assert!(fault.detail.contains("calls square, which is not among the call's .calltargets"), "{fault}");
}

#[test]
fn a_function_is_no_memory() {
    for access in ["ld.global.u32 %r1, [%q0];", "ld.u32 %r1, [%q0];", "st.u32 [%q0], %t;"] {
        let device = Device::new(&module(access));
        let fault = call(&device, &[word(&device, "table", 0)]).expect_err(access);
        assert_eq!(fault.kind, FaultKind::OutOfBounds, "{fault}");
    }
}

/// Twelve functions that call each other through an address: with all calls in line, half a thousand million bodies.
#[test]
fn code_that_would_grow_without_end_nests_less_deep() {
    let mut text = ".version 8.0\n.target sm_80\n.address_size 64\n".to_string();
    let call = "call (y0), %q0, (x0, x1), proto;";
    let body = ".reg .b32 %a<4>;\n.reg .b64 %q<4>;\n.reg .pred %c;\n.param .b32 x0;\n.param .b64 x1;\n.param .b32 y0;\n\
                proto: .callprototype (.param .b32 _) _ (.param .b32 _, .param .b64 _);\n";
    for i in 0..12 {
        // f(x, list) is x + i if the list ends here, else twice what the list's next function gives, plus i.
        text += &format!(
            ".func (.param .b32 r) f{i}(.param .b32 x, .param .b64 list)\n{{\n{body}ld.param.u32 %a0, [x];\n\
             ld.param.u64 %q1, [list];\nld.global.u64 %q0, [%q1];\nsetp.eq.u64 %c, %q0, 0;\n@%c bra end;\n\
             add.u64 %q1, %q1, 8;\nst.param.b32 [x0], %a0;\nst.param.b64 [x1], %q1;\n{call}\n\
             ld.param.u32 %a0, [y0];\nadd.u32 %a0, %a0, %a0;\nend:\nadd.u32 %a0, %a0, {i};\n\
             st.param.b32 [r], %a0;\nret;\n}}\n"
        );
    }
    let names: Vec<String> = (0..12).map(|i| format!("f{i}")).collect();
    text += &format!(".global .u64 functions[12] = {{{}}};\n", names.join(", "));
    text += &format!(
        ".visible .entry k(.param .u64 out, .param .u64 list)\n{{\n{body}.reg .b64 %p;\nld.param.u64 %p, [out];\n\
         ld.param.u64 %q1, [list];\nld.global.u64 %q0, [%q1];\nadd.u64 %q1, %q1, 8;\nst.param.b32 [x0], 100;\n\
         st.param.b64 [x1], %q1;\n{call}\nld.param.u32 %a0, [y0];\nst.global.u32 [%p], %a0;\nret;\n}}\n"
    );
    let device = Device::new(&text);
    let run = |list: &[u64]| {
        let mut list: Vec<u64> = list.iter().map(|&index| word(&device, "functions", index)).collect();
        list.push(0);
        let (out, list) = (device.upload(&[0u32]), device.upload(&list));
        device.run("k", [1; 3], [1; 3], 0, &[Arg::U64(out), Arg::U64(list)])?;
        Ok::<u32, Fault>(device.download(out, 1)[0])
    };
    assert_eq!(run(&[3]).expect("one call"), 103);
    assert_eq!(run(&[3, 11]).expect("a call inside a call"), 3 + 2 * 111);
    let fault = run(&[3, 11, 4]).expect_err("three levels have no room");
    assert!(fault.detail.contains("nested deeper than the 2 calls by address"), "{fault}");
    let fault = run(&[3, 3]).expect_err("f3 from f3");
    assert!(fault.detail.contains("recursion is not supported"), "{fault}");
}
