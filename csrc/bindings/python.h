// Functions of C++ for Python, by Python's stable interface: nothing else to install, and a second to compile.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace wavemix::bindings {

// Python's own exception is set.
struct PythonError {};

// An argument of another type than the function's: a TypeError that names the argument.
struct WrongType {
  std::string expected, got;
};

// --- Arguments ---------------------------------------------------------------------------------------------

int64_t read_integer(PyObject* object, int64_t least, int64_t most);
uint64_t read_unsigned(PyObject* object);
bool read_bool(PyObject* object);
double read_double(PyObject* object);
std::string read_string(PyObject* object);

// The items of a list, a tuple or another sequence.
class Items {
 public:
  explicit Items(PyObject* object);
  ~Items() { Py_XDECREF(made_); }
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;

  size_t size() const { return size_; }
  PyObject* operator[](size_t i) const;
  void expect(size_t size) const;

 private:
  PyObject* from_;
  PyObject* made_ = nullptr;  // of a sequence that is neither list nor tuple
  bool tuple_;
  size_t size_;
};

inline void read(PyObject* object, bool& to) { to = read_bool(object); }
inline void read(PyObject* object, double& to) { to = read_double(object); }
inline void read(PyObject* object, std::string& to) { to = read_string(object); }

template <class Integer, std::enable_if_t<std::is_integral_v<Integer>, int> = 0>
void read(PyObject* object, Integer& to) {
  using Limits = std::numeric_limits<Integer>;
  if constexpr (sizeof(Integer) == sizeof(uint64_t) && std::is_unsigned_v<Integer>)
    to = static_cast<Integer>(read_unsigned(object));
  else
    to = static_cast<Integer>(read_integer(object, Limits::min(), Limits::max()));
}

template <class T>
void read(PyObject* object, std::vector<T>& to);
template <class T, size_t size>
void read(PyObject* object, std::array<T, size>& to);

template <class... T>
void read(PyObject* object, std::tuple<T...>& to) {
  const Items items(object);
  items.expect(sizeof...(T));
  size_t i = 0;
  std::apply([&](T&... one) { (read(items[i++], one), ...); }, to);
}

template <class T>
void read(PyObject* object, std::vector<T>& to) {
  const Items items(object);
  to.resize(items.size());
  for (size_t i = 0; i < items.size(); ++i) read(items[i], to[i]);
}

template <class T, size_t size>
void read(PyObject* object, std::array<T, size>& to) {
  const Items items(object);
  items.expect(size);
  for (size_t i = 0; i < size; ++i) read(items[i], to[i]);
}

// --- Results -----------------------------------------------------------------------------------------------

PyObject* made(bool value);
PyObject* made(double value);
PyObject* made(const char* value);
PyObject* made(const std::vector<const char*>& values);
PyObject* made(const std::vector<uint32_t>& values);
PyObject* made_integer(int64_t value);

template <class Integer, std::enable_if_t<std::is_integral_v<Integer> && !std::is_same_v<Integer, bool>, int> = 0>
PyObject* made(Integer value) {
  return made_integer(static_cast<int64_t>(value));
}

// --- Functions ---------------------------------------------------------------------------------------------

// Lets other threads of Python run.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// Calls a function of C++: `given` holds an argument for each of its parameters, null where a last one was left out.
// `at` follows the argument that is read, for errors.
using AnyFunction = void (*)();
using Call = PyObject* (*)(AnyFunction function, PyObject* const* given, size_t& at);

template <class Result, class... Arguments>
struct Caller {
  static PyObject* call(AnyFunction address, PyObject* const* given, size_t& at) {
    std::tuple<std::decay_t<Arguments>...> values;
    std::apply([&](auto&... one) { ((given[at] ? read(given[at], one) : void(), ++at), ...); }, values);
    const auto function = reinterpret_cast<Result (*)(Arguments...)>(address);
    if constexpr (std::is_void_v<Result>) {
      std::apply(function, values);
      return Py_BuildValue("");
    } else {
      return made(std::apply(function, values));
    }
  }
};

// A module on its way to Python.
class Module {
 public:
  explicit Module(PyObject* module) : module_(module) {}

  // Adds a function. `optional`: how many of the last parameters may be left out; they are empty then.
  template <class Function>
  void def(const char* name, Function function, std::vector<const char*> parameters, size_t optional = 0) {
    add_plain(name, +function, std::move(parameters), optional);
  }

  template <class Value>
  void attr(const char* name, const Value& value) {
    add_object(name, made(value));
  }

 private:
  template <class Result, class... Arguments>
  void add_plain(const char* name, Result (*function)(Arguments...), std::vector<const char*> parameters,
                 size_t optional) {
    add_function(name, &Caller<Result, Arguments...>::call, reinterpret_cast<AnyFunction>(function),
                 sizeof...(Arguments), std::move(parameters), optional);
  }
  void add_function(const char* name, Call call, AnyFunction function, size_t count,
                    std::vector<const char*> parameters, size_t optional);
  void add_object(const char* name, PyObject* object);

  PyObject* module_;
};

// Makes a module, filled by `fill`. Python calls it at import.
PyObject* make_module(PyModuleDef& definition, void (*fill)(Module&));

}  // namespace wavemix::bindings

#define WAVEMIX_JOINED_(a, b) a##b
#define WAVEMIX_JOINED(a, b) WAVEMIX_JOINED_(a, b)
#define WAVEMIX_QUOTED_(name) #name
#define WAVEMIX_QUOTED(name) WAVEMIX_QUOTED_(name)

// Opens the function that fills module `name`.
#define WAVEMIX_MODULE(name, about)                                                                           \
  static void wavemix_fill(wavemix::bindings::Module& m);                                                     \
  PyMODINIT_FUNC WAVEMIX_JOINED(PyInit_, name)() {                                                            \
    static PyModuleDef definition = {                                                                         \
        PyModuleDef_HEAD_INIT, WAVEMIX_QUOTED(name), about, -1, nullptr, nullptr, nullptr, nullptr, nullptr}; \
    return wavemix::bindings::make_module(definition, wavemix_fill);                                          \
  }                                                                                                           \
  static void wavemix_fill(wavemix::bindings::Module& m)
